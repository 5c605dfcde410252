//! QEMU's command line.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use bhatti_engine::{Accelerator, VmSpec};
use bhatti_types::SandboxId;
use bhatti_vmm::Volume;

use crate::record::Machine;

/// Changes with every change of the machine that QEMU is told to make, devices, their order and the
/// kernel's command line included: a saved VM can only be restored
/// on the machine that it was saved on.
pub(crate) const LAYOUT: u32 = 4;

/// The name of the root disk for the monitor.
pub(crate) const ROOT_DRIVE: &str = "root";

/// The size of a disk that is none.
const EMPTY_VOLUME_BYTES: u64 = 1 << 20;

/// The link address of a card before its guest has another.
const UNCONFIGURED_MAC: &str = "06:62:00:00:00:00";

/// What QEMU is handed, already open: the sockets that it listens on, and the tap that its network card ends at.
pub(crate) struct Handed<'a> {
    pub(crate) agent: BorrowedFd<'a>,
    pub(crate) console: BorrowedFd<'a>,
    pub(crate) qmp: BorrowedFd<'a>,
    pub(crate) tap: Option<BorrowedFd<'a>>,
}

impl<'a> Handed<'a> {
    /// All of it.
    pub(crate) fn all(&self) -> Vec<BorrowedFd<'a>> {
        let Self { agent, console, qmp, tap } = *self;
        [agent, console, qmp].into_iter().chain(tap).collect()
    }
}

/// QEMU's own memory, in MiB: its program's, its devices' and its threads'.
const OWN_MIB: u32 = 48;

/// Under software emulation, the memory for translated code, in MiB. When it is full it is emptied, and what runs is translated again. QEMU
/// takes up to 1024 by itself, however small the guest, and a guest can fill it.
pub(crate) const TRANSLATED_MIB: u32 = 128;

/// What QEMU takes beside its guest's memory, in MiB.
pub(crate) const fn vmm_mib(accelerator: Accelerator) -> u32 {
    match accelerator {
        Accelerator::Kvm => OWN_MIB,
        Accelerator::Tcg => OWN_MIB + TRANSLATED_MIB,
    }
}

/// The name by which the process of a sandbox's VM can be found.
pub(crate) fn vm_name(id: SandboxId) -> String {
    format!("bhatti-{id}")
}

/// The arguments that make the machine: the same for a boot and for a restore.
///
/// `pit=off,pic=off` with the TSC's frequency on the kernel's command line: a microvm has no timer that its kernel could trust for
/// calibration, and with QEMU's default ones most boots die under software emulation. Without a configuration section and a description of
/// the devices, a file of device states alone is what an incoming migration expects.
pub(crate) fn machine_arguments(
    accelerator: Accelerator,
    id: SandboxId,
    machine: &Machine,
    directory: &Path,
    handed: &Handed<'_>,
) -> Vec<String> {
    let mut arguments = Arguments::default();
    arguments.add("-name", vm_name(id));
    arguments.add(
        "-M",
        "microvm,pit=off,pic=off,rtc=on,isa-serial=on,memory-backend=ram,suppress-vmdesc=on",
    );
    arguments.add("-global", "migration.send-configuration=off");
    // Nor does QEMU say for a card that it has moved: whoever is restored may be another by then.
    arguments.add("-global", "migration.announce-rounds=0");
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm".to_owned(), "host"),
        Accelerator::Tcg => (format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}"), "max"),
    };
    arguments.add("-accel", accel);
    arguments.add("-cpu", cpu);
    arguments.add("-smp", machine.cpus.to_string());
    arguments.add("-m", format!("{}M", machine.memory_mib));
    // Private to this VM, and the file opened for reading alone: others stand on it.
    arguments.add(
        "-object",
        format!(
            "memory-backend-file,id=ram,size={}M,share=off,readonly=on,rom=off,mem-path={}",
            machine.memory_mib,
            value(&directory.join(&machine.memory))
        ),
    );
    arguments.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
    arguments.add("-display", "none");
    arguments
        .add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    arguments.listen("qmp", handed.qmp);
    arguments.add("-mon", "chardev=qmp,mode=control");
    arguments.listen("console", handed.console);
    arguments.add("-serial", "chardev:console");
    arguments.listen("agent", handed.agent);
    arguments.add("-device", "virtio-serial-device,max_ports=2");
    arguments.add("-device", "virtserialport,chardev=agent,name=agent");
    arguments.add(
        "-drive",
        format!(
            "id={ROOT_DRIVE},if=none,format=qcow2,discard=unmap,werror=report,rerror=report,file={}",
            value(&directory.join(&machine.disk))
        ),
    );
    arguments.add("-device", format!("virtio-blk-device,drive={ROOT_DRIVE},serial=root"));
    for (slot, volume) in machine.volumes.iter().enumerate() {
        arguments.add("-drive", volume_drive(slot, volume.as_ref()));
        arguments
            .add("-device", format!("virtio-blk-device,drive=volume{slot},serial=volume{slot}"));
    }
    if let Some(tap) = handed.tap {
        arguments.add("-netdev", format!("tap,id=net,fd={}", tap.as_raw_fd()));
        // A restored guest would tell its network that it is there, by the address of the guest that it was.
        let card =
            format!("virtio-net-device,netdev=net,mac={UNCONFIGURED_MAC},guest_announce=off");
        arguments.add("-device", card);
    }
    arguments.0
}

/// A place for a volume, and what is in it. QEMU locks the file: of two that would write it, the second does not start.
fn volume_drive(slot: usize, volume: Option<&Volume>) -> String {
    let drive = format!("id=volume{slot},if=none,werror=report,rerror=report");
    match volume {
        None => format!("{drive},driver=null-co,size={EMPTY_VOLUME_BYTES}"),
        Some(Volume { path, read_only }) => {
            let access = if *read_only { "readonly=on" } else { "discard=unmap" };
            format!("{drive},format=raw,{access},file={}", value(path))
        }
    }
}

/// The arguments by which the machine boots.
pub(crate) fn boot_arguments(spec: &VmSpec, tsc_khz: Option<u64>) -> Vec<String> {
    let mut arguments = Arguments::default();
    arguments.add("-kernel", spec.kernel.to_string_lossy());
    arguments.add("-initrd", spec.initramfs.to_string_lossy());
    arguments.add("-append", kernel_command_line(spec, tsc_khz));
    arguments.0
}

/// The arguments by which the machine waits for its state, and does not run when it has it.
pub(crate) fn restore_arguments() -> Vec<String> {
    ["-incoming", "defer", "-S"].map(str::to_owned).to_vec()
}

fn kernel_command_line(spec: &VmSpec, tsc_khz: Option<u64>) -> String {
    let tsc = tsc_khz.map(|khz| format!(" tsc_early_khz={khz} tsc=reliable")).unwrap_or_default();
    // `hostname=` is the kernel's own parameter. A kernel that panics reboots at once, which ends QEMU. Of the security modules, those
    // stay that do nothing unless somebody has them do it.
    format!(
        "console=ttyS0 earlyprintk=ttyS0,115200 quiet reboot=t panic=-1{tsc} lsm=landlock,yama,bpf audit=0 hostname={} rdinit=/lohar",
        spec.hostname
    )
}

/// A path as the value of an option: a comma would end it.
fn value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.extend([option.to_owned(), value.into()]);
    }

    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    fn listen(&mut self, id: &str, socket: BorrowedFd<'_>) {
        self.add(
            "-chardev",
            format!("socket,id={id},fd={},server=on,wait=off", socket.as_raw_fd()),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comma_in_a_path_stays_in_the_path() {
        assert_eq!(value(Path::new("/data, two/root.qcow2")), "/data,, two/root.qcow2");
    }
}
