//! Loads kernel modules on demand.
//!
//! The kernel runs [`PATH`] when a program uses a feature that a module provides: a file system,
//! a kind of network device, a device file. The path is a link to this program, so it works in
//! every image. Programs may run it, too: it accepts the common options of modprobe(8) from kmod.
//! `bhatti setup` chose the modules and wrote their index.

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::log;

/// The path of the program in a guest.
pub(crate) const PATH: &str = "/run/bhatti/modprobe";
/// The directory of the modules in a guest.
pub(crate) const MODULES: &str = "/run/bhatti/modules";
/// The index's name in the modules' directory.
const INDEX: &str = "index";

/// The kernel's flag of finit_module(2) for a file that it has to unpack.
const COMPRESSED_FILE: i32 = 4;

/// Whether this program was called as `modprobe`.
pub(crate) fn is_called() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name().is_some_and(|name| name == "modprobe"))
}

/// Loads the modules that the arguments of this process name. On failure, prints a line to
/// stderr; with `-q`, only if the arguments are invalid.
pub(crate) fn run() -> ExitCode {
    let request = match Request::parse(std::env::args_os().skip(1)) {
        Ok(request) => request,
        Err(reason) => {
            log::line(format_args!("modprobe: {reason}"));
            return ExitCode::FAILURE;
        }
    };
    match load_all(&request) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            if !request.quiet {
                log::line(format_args!("modprobe: {reason}"));
            }
            ExitCode::FAILURE
        }
    }
}

/// The arguments of a `modprobe` call.
#[derive(Debug, Default, PartialEq, Eq)]
struct Request {
    quiet: bool,
    names: Vec<String>,
    /// Parameters of the named module, separated by spaces.
    parameters: String,
}

impl Request {
    fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let (mut request, mut all, mut options_may_follow) = (Self::default(), false, true);
        let mut parameters = Vec::new();
        for argument in arguments {
            let argument = argument.to_string_lossy().into_owned();
            if options_may_follow && argument.starts_with('-') {
                match argument.as_str() {
                    "--" => options_may_follow = false,
                    "--quiet" => request.quiet = true,
                    "--all" => all = true,
                    "--verbose" | "--syslog" | "--use-blacklist" => {}
                    letters if letters[1..].chars().all(|letter| "qavsb".contains(letter)) => {
                        request.quiet |= letters.contains('q');
                        all |= letters.contains('a');
                    }
                    _ => {
                        return Err(format!("option {argument} is not known; install kmod for it"));
                    }
                }
            } else if all || request.names.is_empty() {
                request.names.push(argument);
            } else {
                parameters.push(argument);
            }
        }
        if request.names.is_empty() {
            return Err("no module is named".into());
        }
        request.parameters = parameters.join(" ");
        Ok(request)
    }
}

fn load_all(request: &Request) -> Result<(), String> {
    let index = Path::new(MODULES).join(INDEX);
    let text = fs::read_to_string(&index)
        .map_err(|error| format!("failed to read {}: {error}", index.display()))?;
    let modules: Vec<Module<'_>> = text.lines().filter_map(Module::parse).collect();
    for name in &request.names {
        let found = find(&modules, name);
        if found.is_empty() {
            return Err(format!("module {name} not found in {MODULES}"));
        }
        for module in loading_order(&modules, &found) {
            let parameters = if found.contains(&module) { request.parameters.as_str() } else { "" };
            load(&modules[module], parameters)
                .map_err(|error| format!("failed to load {}: {error}", modules[module].file))?;
        }
    }
    Ok(())
}

/// A line of the index.
#[derive(Debug)]
struct Module<'a> {
    name: &'a str,
    file: &'a str,
    needs: Vec<&'a str>,
    aliases: Vec<&'a str>,
}

impl<'a> Module<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split('\t');
        let (name, file) = (fields.next()?, fields.next()?);
        let mut names = || Some(fields.next()?.split_whitespace().collect());
        Some(Self { name, file, needs: names()?, aliases: names()? })
    }
}

/// Returns the indexes in `modules` of modules with this name or alias. The kernel treats dashes
/// and underscores alike.
fn find(modules: &[Module<'_>], wanted: &str) -> Vec<usize> {
    let plain = |name: &str| name.replace('-', "_");
    let wanted = plain(wanted);
    let named = modules.iter().position(|module| plain(module.name) == wanted);
    if let Some(named) = named {
        return vec![named];
    }
    let has_alias = |module: &Module<'_>| module.aliases.iter().any(|alias| plain(alias) == wanted);
    (0..modules.len()).filter(|place| has_alias(&modules[*place])).collect()
}

/// Returns `wanted` and their dependencies, each after its own dependencies. Modules that are not
/// in the index are built in or were loaded at boot.
fn loading_order(modules: &[Module<'_>], wanted: &[usize]) -> Vec<usize> {
    fn visit(
        modules: &[Module<'_>],
        place: usize,
        seen: &mut BTreeSet<usize>,
        order: &mut Vec<usize>,
    ) {
        if !seen.insert(place) {
            return;
        }
        for needed in &modules[place].needs {
            for needed in find(modules, needed) {
                visit(modules, needed, seen, order);
            }
        }
        order.push(place);
    }
    let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
    for place in wanted {
        visit(modules, *place, &mut seen, &mut order);
    }
    order
}

fn load(module: &Module<'_>, parameters: &str) -> io::Result<()> {
    let path = Path::new(MODULES).join(module.file);
    let file = open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let packed = path.extension().is_some_and(|ending| ending != "ko");
    let parameters = CString::new(parameters)?;
    match finit_module(&file, &parameters, if packed { COMPRESSED_FILE } else { 0 }) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX_TEXT: &str = "nf_log_syslog\tnf_log_syslog.ko.xz\t\t\n\
        overlay\toverlay.ko.xz\t\tfs-overlay\n\
        x_tables\tx_tables.ko.xz\tvirtio_net\t\n\
        xt_LOG\txt_LOG.ko.xz\tx_tables nf_log_syslog\tipt_LOG ip6t_LOG\n\
        xt_circle\txt_circle.ko\txt_circle xt_LOG\tipt_LOG\n";

    fn order(name: &str) -> Vec<&'static str> {
        let modules: Vec<_> = INDEX_TEXT.lines().filter_map(Module::parse).collect();
        let found = find(&modules, name);
        loading_order(&modules, &found).into_iter().map(|place| modules[place].name).collect()
    }

    #[test]
    fn modules_are_found_by_name_and_alias_and_load_after_their_dependencies() {
        assert_eq!(order("fs-overlay"), ["overlay"]);
        assert_eq!(order("fs_overlay"), ["overlay"]);
        assert_eq!(order("xt-LOG"), ["x_tables", "nf_log_syslog", "xt_LOG"]);
        assert_eq!(order("ipt_LOG"), ["x_tables", "nf_log_syslog", "xt_LOG", "xt_circle"]);
        assert!(order("nothing").is_empty());
    }

    #[test]
    fn arguments_of_the_kernel_and_of_programs_are_parsed() {
        let parse = |line: &str| Request::parse(line.split_whitespace().map(OsString::from));

        let kernels = parse("-q -- net-pf-16-proto-12").unwrap();
        assert_eq!((kernels.quiet, kernels.names), (true, vec!["net-pf-16-proto-12".to_owned()]));
        assert_eq!(parse("-va bridge br_netfilter").unwrap().names, ["bridge", "br_netfilter"]);
        let with_parameters = parse("loop max_loop=8 max_part=15").unwrap();
        assert_eq!(with_parameters.names, ["loop"]);
        assert_eq!(with_parameters.parameters, "max_loop=8 max_part=15");
        assert_eq!(parse("-r loop").unwrap_err(), "option -r is not known; install kmod for it");
        assert_eq!(parse("-q").unwrap_err(), "no module is named");
    }
}
