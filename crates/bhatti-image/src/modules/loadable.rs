//! Kernel modules that a guest can load when a program needs them: for containers, networks and
//! file systems.
//!
//! Modules of Debian's kernel stay packed, because it unpacks modules itself. Another kernel may
//! not, so its modules are unpacked. An index lists them, which lohar's `modprobe` reads. Each
//! line of the index describes one module:
//!
//! ```text
//! NAME TAB FILE TAB DEPENDENCIES, separated by spaces TAB ALIASES, separated by spaces
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{
    ModuleError, dependencies, file_error, find_modules, information, module_name, read_module,
};
use crate::content_hash;

/// The index's file name.
pub(crate) const INDEX: &str = "index";

/// Directories of the kernel's tree whose modules are all copied: packet filters, bridges, packet
/// schedulers.
const DIRECTORIES: [&str; 5] =
    ["net/netfilter", "net/ipv4/netfilter", "net/ipv6/netfilter", "net/bridge", "net/sched"];

/// Further modules by name, as the kernel writes it. Modules that a kernel does not have are
/// skipped.
const NAMES: [&str; 38] = [
    // File systems and disks.
    "overlay",
    "fuse",
    "cuse",
    "squashfs",
    "isofs",
    "erofs",
    "vfat",
    "exfat",
    "nls_cp437",
    "nls_iso8859_1",
    "nls_utf8",
    "nls_ascii",
    "binfmt_misc",
    "loop",
    "nbd",
    "dm_mod",
    // Networks.
    "tun",
    "tap",
    "veth",
    "macvlan",
    "macvtap",
    "ipvlan",
    "vxlan",
    "8021q",
    "dummy",
    "ifb",
    "vrf",
    "wireguard",
    "ipip",
    "sit",
    "ip_gre",
    "tcp_bbr",
    "tls",
    "af_packet",
    "unix_diag",
    "udp_diag",
    "raw_diag",
    "packet_diag",
];

/// Whether modules stay packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// Modules stay packed; the kernel unpacks them.
    Kept,
    /// Modules are unpacked.
    Undone,
}

/// A name for this choice of modules.
pub(crate) fn wanted() -> String {
    content_hash::of_bytes([&DIRECTORIES[..], &NAMES[..]].concat().join(",").as_bytes())
}

/// Copies the loadable modules of `tree` and their index into the new directory `target`, with
/// all their dependencies except those in `loaded_at_boot`.
pub(crate) fn collect(
    tree: &Path,
    loaded_at_boot: &[String],
    packing: Packing,
    target: &Path,
) -> Result<(), ModuleError> {
    fs::create_dir(target).map_err(|source| file_error("create", target, source))?;
    let mut files = Vec::new();
    find_modules(tree, &mut files)?;
    let files: BTreeMap<String, PathBuf> =
        files.into_iter().filter_map(|file| Some((module_name(&file)?, file))).collect();
    let mut collected = BTreeMap::new();
    let mut wanted: Vec<String> = files
        .iter()
        .filter(|(name, file)| is_wanted(name, file))
        .map(|(name, _)| name.clone())
        .collect();
    while let Some(name) = wanted.pop() {
        let Some(file) = files.get(&name) else { continue };
        if collected.contains_key(&name) || loaded_at_boot.contains(&name) {
            continue;
        }
        let bytes = read_module(file).map_err(|source| file_error("read", file, source))?;
        let module = Module::of(&bytes);
        wanted.extend(module.needs.iter().cloned());
        let copy = match packing {
            Packing::Kept => target.join(file.file_name().unwrap_or_default()),
            Packing::Undone => target.join(format!("{name}.ko")),
        };
        match packing {
            Packing::Kept => fs::copy(file, &copy).map(drop),
            Packing::Undone => fs::write(&copy, &bytes),
        }
        .map_err(|source| file_error("write", &copy, source))?;
        collected.insert(name, (copy, module));
    }
    let lines = collected.iter().map(|(name, (copy, module))| {
        let file = copy.file_name().unwrap_or_default().to_string_lossy();
        format!("{name}\t{file}\t{}\t{}\n", module.needs.join(" "), module.aliases.join(" "))
    });
    let index = target.join(INDEX);
    fs::write(&index, lines.collect::<String>())
        .map_err(|source| file_error("write", &index, source))
}

fn is_wanted(name: &str, file: &Path) -> bool {
    let within = |directory| {
        let parts: Vec<_> = Path::new(directory).components().collect();
        let path: Vec<_> = file.components().collect();
        path.windows(parts.len()).any(|window| window == parts)
    };
    NAMES.contains(&name) || DIRECTORIES.into_iter().any(within)
}

/// A module's information about itself.
struct Module {
    needs: Vec<String>,
    aliases: Vec<String>,
}

impl Module {
    fn of(bytes: &[u8]) -> Self {
        let mut needs = dependencies(bytes);
        for line in information(bytes, "softdep=") {
            // "pre: a b post: c"
            let before = line.split("post:").next().unwrap_or_default();
            let names = before.trim_start().strip_prefix("pre:").unwrap_or_default();
            needs.extend(names.split_whitespace().map(|name| name.replace('-', "_")));
        }
        // Patterns match devices, and a guest has no devices that need further modules.
        let is_name = |alias: &String| {
            !alias.contains(['*', '?', '[']) && !alias.contains(char::is_whitespace)
        };
        Self { needs, aliases: information(bytes, "alias=").filter(is_name).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loadable_modules_stay_packed_with_an_index_of_dependencies_and_aliases() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        let write = |path: &str, information: &str| {
            let file = tree.join("6.1/kernel").join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("\x7fELF\0{}\0", information.replace('|', "\0"))).unwrap();
        };
        write("fs/overlayfs/overlay.ko", "alias=fs-overlay|depends=");
        write(
            "net/netfilter/xt_LOG.ko",
            "softdep=pre: nf_log_syslog|alias=ipt_LOG|depends=x-tables",
        );
        write("net/netfilter/x_tables.ko", "depends=virtio_net");
        write("lib/nf_log_syslog.ko", "depends=");
        write("drivers/net/virtio_net.ko", "alias=virtio:d1v*|depends=");
        write("drivers/gpu/unwanted.ko", "depends=");
        // A directory whose name only has the same prefix.
        write("net/bridge2/unwanted2.ko", "depends=");

        let target = root.path().join("loadable");
        collect(&tree, &["virtio_net".into()], Packing::Kept, &target).unwrap();

        assert_eq!(
            fs::read_to_string(target.join(INDEX)).unwrap(),
            "nf_log_syslog\tnf_log_syslog.ko\t\t\n\
             overlay\toverlay.ko\t\tfs-overlay\n\
             x_tables\tx_tables.ko\tvirtio_net\t\n\
             xt_LOG\txt_LOG.ko\tx_tables nf_log_syslog\tipt_LOG\n"
        );
        assert_eq!(fs::read_dir(&target).unwrap().count(), 5);
    }
}
