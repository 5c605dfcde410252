//! Runs `bhatti_engine::conformance` on the Firecracker engine, and tests its jail. Firecracker
//! must be installed: as `FIRECRACKER_BIN` or on the `PATH`, with its jailer beside it or on the
//! `PATH`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bhatti_engine::Engine;
use bhatti_firecracker::{Firecracker, FirecrackerEngine, PROGRAM, check};
use bhatti_host::namespace;
use bhatti_testkit::conformance::on_trial;
use bhatti_testkit::{skip, vmm_pid};

/// Returns the engine, if it can run on this host.
async fn engine() -> Option<FirecrackerEngine> {
    let program = std::env::var("FIRECRACKER_BIN").unwrap_or_else(|_| PROGRAM.to_owned());
    match (check(program.as_ref(), None).await, bhatti_host::kvm::check()) {
        (Ok(found), Ok(())) => return Some(Firecracker::engine(found)),
        (Err(bhatti_firecracker::Unusable::NotInstalled { .. }), _) => {
            skip("firecracker engine", "no firecracker binary was found");
        }
        (Err(error), _) => skip("firecracker engine", &error.to_string()),
        (_, Err(error)) => skip("firecracker engine", &error.to_string()),
    }
    None
}

bhatti_testkit::conformance_tests!(engine().await);

/// Checks the files and rights that a compromised VMM would have.
#[tokio::test]
async fn vmm_of_a_root_daemon_has_no_rights_and_sees_only_its_own_files() {
    let Some(engine) = engine().await else { return };
    if namespace::enter_own_network().is_err() {
        skip("firecracker's jail", "only root's Firecracker is jailed");
        return;
    }
    on_trial(&engine, async |bench| {
        let mut spec = bench.spec.clone();
        spec.tap = Some("bhjail0".to_owned());
        let _vm = engine.boot(&spec).await.unwrap();
        let pid = vmm_pid(&spec.directory).unwrap();
        let process = Path::new("/proc").join(pid.to_string());

        let status = fs::read_to_string(process.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let user = fs::metadata(spec.directory.join("disk.ext4")).unwrap().uid();
        assert!(user >= 0x7000_0000, "{user}");
        assert_eq!(field("Uid:"), vec![user.to_string(); 4]);
        assert_eq!(field("Gid:"), vec![user.to_string(); 4]);
        assert_eq!(field("CapEff:"), ["0000000000000000"]);
        assert_eq!(field("CapPrm:"), ["0000000000000000"]);

        let root = fs::read_dir(process.join("root")).unwrap().flatten();
        let mut seen: Vec<_> =
            root.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        seen.sort();
        let own = [
            "api.sock",
            "dev",
            "disk.ext4",
            "firecracker",
            "firecracker.pid",
            "run",
            "vmm.log",
            "vsock.sock",
        ];
        assert_eq!(seen, own, "the jail has only the VMM's own files, without the boot files");

        let groups = fs::read_to_string(process.join("cgroup")).unwrap();
        assert!(groups.contains(&format!("/bhatti/bhatti-{}", spec.id)), "{groups}");
        let devices = || fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        assert!(devices().contains("bhjail0"));

        engine.kill(spec.id, &spec.directory).await.unwrap();

        assert!(!devices().contains("bhjail0"));
        assert!(!spec.directory.join("vmm").exists() && !spec.directory.join("jail").exists());
        for tree in ["", "memory", "pids"] {
            let group = Path::new("/sys/fs/cgroup").join(tree).join("bhatti");
            assert!(!group.join(format!("bhatti-{}", spec.id)).exists());
        }
    })
    .await;
}
