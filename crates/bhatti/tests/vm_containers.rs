//! Containers in a sandbox, and the kernel modules and devices that they need.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use bhatti_testkit::{Feature, Serve, TestDaemon, needs};

/// Runs a command of the CLI that must succeed, and returns what it printed.
async fn ask(daemon: &TestDaemon, arguments: &[&str]) -> String {
    let output = daemon.cli(arguments).output().await.unwrap();
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {stdout}{stderr}");
    stdout.into_owned()
}

async fn shell(daemon: &TestDaemon, user: &str, script: &str) -> String {
    ask(daemon, &["exec", "--user", user, "box", "--", "sh", "-ec", script]).await
}

#[tokio::test]
async fn docker_and_podman_run_containers_from_a_local_tar() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let images = bhatti_testkit::repository().join("target/test-data-containers/images");
    let daemon = TestDaemon::start_with(Serve { images: Some(images), ..Serve::default() }).await;
    ask(&daemon, &["create", "--name", "box", "--image", "containers", "--memory", "1024"]).await;

    shell(&daemon, "root", "tar -cf /tmp/busy.tar -C / bin/busybox").await;
    let start = "
        dockerd >/tmp/dockerd.log 2>&1 &
        until docker info >/dev/null 2>&1; do kill -0 $! || { cat /tmp/dockerd.log; exit 1; }; sleep 0.2; done
        docker info --format '{{.Driver}} {{.CgroupVersion}}'";
    assert_eq!(shell(&daemon, "root", start).await, "overlay2 2\n");
    let serve = "
        docker import /tmp/busy.tar busy >/dev/null
        docker run -d -p 8080:80 --name web --memory 64m busy /bin/busybox sh -c '
            /bin/busybox mkdir /www; echo from a container >/www/index.html
            exec /bin/busybox httpd -f -h /www' >/dev/null
        curl -s --retry 100 --retry-delay 1 --retry-connrefused http://127.0.0.1:8080/
        docker exec web /bin/busybox cat /sys/fs/cgroup/memory.max
        docker rm -f web >/dev/null";
    assert_eq!(shell(&daemon, "root", serve).await, "from a container\n67108864\n");

    // Podman runs as the usual user, with its own network over /dev/net/tun.
    let rootless = "
        podman --storage-driver overlay import -q /tmp/busy.tar busy >/dev/null
        podman --storage-driver overlay run --rm busy /bin/busybox sh -c '
            echo $(/bin/busybox id -u) $(/bin/busybox ip -o -4 address show tap0 | /bin/busybox wc -l)'";
    assert_eq!(shell(&daemon, "user", rootless).await, "0 1\n");
    ask(&daemon, &["destroy", "box"]).await;
}

#[tokio::test]
async fn kernel_modules_and_devices_load_on_first_use() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    ask(&daemon, &["create", "--name", "box"]).await;
    let loaded = "cut -d' ' -f1 /proc/modules";
    assert!(!shell(&daemon, "root", loaded).await.contains("overlay"), "loaded before its use");

    // The kernel requests these by alias: file system, link kind, device number, netlink family.
    let used = "
        mkdir -p /tmp/o/lower /tmp/o/upper /tmp/o/work /tmp/o/both
        mount -t overlay overlay -o lowerdir=/tmp/o/lower,upperdir=/tmp/o/upper,workdir=/tmp/o/work /tmp/o/both
        ip link add bridge9 type bridge
        ip link add left type veth peer name right master bridge9
        truncate -s 16M /tmp/disk && mke2fs -q /tmp/disk
        mount -o loop /tmp/disk /tmp/o/lower
        umount /tmp/o/lower";
    shell(&daemon, "root", used).await;
    shell(&daemon, "user", "exec 3<>/dev/net/tun 4<>/dev/fuse").await;
    // No alias leads to br_netfilter: programs load it by name.
    shell(&daemon, "root", "modprobe -q br_netfilter; test -e /proc/sys/net/bridge").await;
    let after = shell(&daemon, "root", loaded).await;
    for module in ["overlay", "bridge", "veth", "loop", "tun", "br_netfilter"] {
        assert!(after.lines().any(|line| line == module), "{module} is not loaded: {after}");
    }
    let unknown = daemon.cli(&["exec", "--user", "root", "box", "--", "modprobe", "nonsense"]);
    let unknown = { unknown }.output().await.unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(said.contains("module nonsense not found in /run/bhatti/modules"), "{said}");
    ask(&daemon, &["destroy", "box"]).await;
}
