//! `bhatti setup`, run as a program.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use bhatti_testkit::{dist, images, is_root, skip, wait_for};

fn setup(data_dir: &Path, arguments: &[&str]) -> tokio::process::Command {
    let mut command = bhatti_host::process::command(dist("bhatti"));
    command.arg("setup").args(arguments).arg("--data-dir").arg(data_dir);
    command
}

/// Finds an existing kernel: the one that the tests' images boot.
fn kernel() -> PathBuf {
    let entries = fs::read_dir(images()).unwrap().flatten();
    let kernel = entries.map(|entry| entry.path().join("vmlinux")).find(|path| path.exists());
    kernel.expect("the images have a kernel")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Lists the names in the directory of images, except the lock.
fn artefacts(data_dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(data_dir.join("images")).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name != ".lock").collect()
}

#[tokio::test]
async fn second_setup_has_nothing_to_do() {
    let data = images().parent().unwrap().to_owned();

    let output = setup(&data, &[]).output().await.unwrap();

    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    assert_eq!(stdout.matches("(already there)").count(), 2, "{stdout}");
    assert!(stdout.ends_with("ready: minimal\n"), "{stdout}");
}

#[tokio::test]
async fn file_that_is_not_a_kernel_is_refused_and_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();

    let output = setup(data.path(), &["--kernel", "/etc/passwd"]).output().await.unwrap();

    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("`/etc/passwd` is neither an ELF vmlinux nor a bzImage"),
        "{}",
        stderr(&output)
    );
    assert_eq!(artefacts(data.path()), Vec::<String>::new());
}

#[tokio::test]
async fn file_without_a_certificate_is_refused_before_anything_is_built() {
    let data = tempfile::tempdir().unwrap();

    let output = setup(data.path(), &["--ca-certificate", "/etc/passwd"]).output().await.unwrap();

    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("`/etc/passwd` has no certificate in PEM"), "{said}");
    assert_eq!(artefacts(data.path()), Vec::<String>::new());
}

/// Runs `script` with a file system of `size` mounted at `data`, visible only to the script.
async fn on_small_disk(data: &Path, size: &str, script: &str) -> Output {
    let script = format!("mount -t tmpfs -o size={size} small '{}' && {script}", data.display());
    bhatti_host::process::command("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output()
        .await
        .unwrap()
}

#[tokio::test]
async fn too_small_a_disk_is_refused_before_anything_is_built() {
    if !is_root() {
        return skip("setup on a full disk", "mounting a small disk needs root");
    }
    let data = tempfile::tempdir().unwrap();
    let (bhatti, kernel) = (dist("bhatti"), kernel());
    let script = format!(
        "{bhatti} setup --data-dir '{data}' --kernel {kernel}; code=$?; ls -A '{data}/images'; exit $code",
        bhatti = bhatti.display(),
        data = data.path().display(),
        kernel = kernel.display(),
    );

    let output = on_small_disk(data.path(), "64m", &script).await;

    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("MiB free; building the kernel takes"), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().last(), Some(".lock"));
}

#[tokio::test]
async fn disk_that_fills_up_during_the_build_leaves_nothing_half_made() {
    if !is_root() {
        return skip("setup on a disk that fills up", "mounting a small disk needs root");
    }
    let data = tempfile::tempdir().unwrap();
    let (bhatti, kernel) = (dist("bhatti"), kernel());
    // There is enough space to begin, and another process takes it as soon as the build has begun.
    let script = format!(
        "{bhatti} setup --data-dir '{data}' --kernel {kernel} & setup=$!
         while ! ls -d '{data}'/images/.build-* >/dev/null 2>&1; do kill -0 $setup 2>/dev/null || break; done
         dd if=/dev/zero of='{data}/hog' bs=1M >/dev/null 2>&1
         wait $setup; code=$?; ls -A '{data}/images'; exit $code",
        bhatti = bhatti.display(),
        data = data.path().display(),
        kernel = kernel.display(),
    );

    let output = on_small_disk(data.path(), "420m", &script).await;

    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    let full =
        stderr(&output).contains("No space left on device") || stderr(&output).contains("MiB free");
    assert!(full, "{}", stderr(&output));
    assert!(!stdout.contains(".build-"), "{stdout}");
}

#[tokio::test]
async fn killed_setup_installs_nothing_and_the_next_one_cleans_up() {
    if !is_root() {
        return skip(
            "a setup that is killed",
            "the small disk that ends the next setup early needs root",
        );
    }
    let data = tempfile::tempdir().unwrap();
    let kernel = kernel();
    let arguments = ["--kernel", kernel.to_str().unwrap()];
    let mut first = setup(data.path(), &arguments).spawn().unwrap();
    wait_for("the build's directory", || {
        artefacts(data.path()).iter().any(|name| name.starts_with(".build-"))
    })
    .await;
    first.kill().await.unwrap();
    let left = artefacts(data.path());
    assert!(left.iter().all(|name| name.starts_with(".build-")), "{left:?}");

    // The disk is too small for the image, so the next setup ends after the kernel.
    let script = format!(
        "mkdir -p '{data}/images/.build-dead' && {bhatti} setup --data-dir '{data}' --kernel {kernel}; ls -A '{data}/images'",
        bhatti = dist("bhatti").display(),
        data = data.path().display(),
        kernel = kernel.display(),
    );
    let output = on_small_disk(data.path(), "900m", &script).await;

    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        stdout.contains("kernel: kernel-") && stdout.contains("\nindex.json"),
        "{stdout}{}",
        stderr(&output)
    );
    assert!(!stdout.contains(".build-"), "{stdout}");
}

#[tokio::test]
async fn kernel_with_other_modules_is_another_kernel() {
    if !is_root() {
        return skip(
            "a kernel with other modules",
            "the small disk that ends the setup early needs root",
        );
    }
    let data = tempfile::tempdir().unwrap();
    let modules = tempfile::tempdir().unwrap();
    fs::write(modules.path().join("virtio_blk.ko"), b"\x7fELF\0depends=\0").unwrap();
    // The disk is too small for the image, so each setup ends after the kernel.
    let script = format!(
        "for modules in '' '--modules {modules}'; do {bhatti} setup --data-dir '{data}' --kernel {kernel} $modules; done; \
         ls -d '{data}'/images/kernel-*; cat '{data}'/images/kernel-*/modules/00-virtio_blk.ko >/dev/null && echo collected",
        modules = modules.path().display(),
        bhatti = dist("bhatti").display(),
        data = data.path().display(),
        kernel = kernel().display(),
    );

    let output = on_small_disk(data.path(), "900m", &script).await;

    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        stdout.lines().filter(|line| line.contains("/images/kernel-")).count(),
        2,
        "{stdout}{}",
        stderr(&output)
    );
    assert!(stdout.ends_with("collected\n"), "{stdout}");
}
