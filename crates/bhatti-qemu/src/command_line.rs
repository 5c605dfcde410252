//! QEMU's command line.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use bhatti_engine::{Accelerator, VmSpec};
use bhatti_proto::AWAIT_ROOT;
use bhatti_vmm::{EMPTY_VOLUME_BYTES, Launch, UNCONFIGURED_MAC, Volume};

/// Version of the machine. Changes with every change of QEMU's machine, including devices, their
/// order and the kernel's command line: a saved VM can only be restored on the machine that it
/// was saved on.
pub(crate) const LAYOUT: u32 = 4;

/// Name of the root disk in the monitor.
pub(crate) const ROOT_DRIVE: &str = "root";

/// The open descriptors that QEMU inherits: the sockets that it listens on, and the tap of its
/// network card.
pub(crate) struct InheritedFiles<'a> {
    pub(crate) agent: BorrowedFd<'a>,
    pub(crate) console: BorrowedFd<'a>,
    pub(crate) qmp: BorrowedFd<'a>,
    pub(crate) tap: Option<BorrowedFd<'a>>,
}

impl<'a> InheritedFiles<'a> {
    /// Returns all descriptors.
    pub(crate) fn all(&self) -> Vec<BorrowedFd<'a>> {
        let Self { agent, console, qmp, tap } = *self;
        [agent, console, qmp].into_iter().chain(tap).collect()
    }
}

/// QEMU's own memory, in MiB: program, devices and threads.
const OWN_MIB: u32 = 48;

/// Under software emulation, the memory for translated code, in MiB. When it is full, QEMU
/// empties it and translates running code again. By default QEMU takes up to 1024 MiB, however
/// small the guest, and a guest can fill it.
pub(crate) const TRANSLATED_MIB: u32 = 128;

/// Returns QEMU's memory in addition to its guest's memory, in MiB.
pub(crate) const fn vmm_mib(accelerator: Accelerator) -> u32 {
    match accelerator {
        Accelerator::Kvm => OWN_MIB,
        Accelerator::Tcg => OWN_MIB + TRANSLATED_MIB,
    }
}

/// Returns the arguments that define the machine: the same for a boot and for a restore.
///
/// `pit=off,pic=off` goes with the TSC's frequency on the kernel's command line: a microvm has no
/// timer that its kernel could trust for calibration, and with QEMU's default timers most boots
/// fail under software emulation. With the configuration section and the description of the
/// devices off, an incoming migration expects a file of device states alone.
pub(crate) fn machine_arguments(
    accelerator: Accelerator,
    launch: &Launch<'_>,
    handed: &InheritedFiles<'_>,
) -> Vec<String> {
    let Launch { id, machine, directory, .. } = *launch;
    let mut arguments = Arguments::default();
    arguments.add("-name", bhatti_vmm::vm_name(id));
    arguments.add(
        "-M",
        "microvm,pit=off,pic=off,rtc=on,isa-serial=on,memory-backend=ram,suppress-vmdesc=on",
    );
    arguments.add("-global", "migration.send-configuration=off");
    // QEMU must not announce the network card after a restore: the guest may have another
    // identity by then.
    arguments.add("-global", "migration.announce-rounds=0");
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm".to_owned(), "host"),
        Accelerator::Tcg => (format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}"), "max"),
    };
    arguments.add("-accel", accel);
    arguments.add("-cpu", cpu);
    arguments.add("-smp", machine.cpus.to_string());
    arguments.add("-m", format!("{}M", machine.memory_mib));
    // The mapping is private to this VM and the file is opened read-only: other VMs use it, too.
    arguments.add(
        "-object",
        format!(
            "memory-backend-file,id=ram,size={}M,share=off,readonly=on,rom=off,mem-path={}",
            machine.memory_mib,
            value(&directory.join(machine.memory_file()))
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
        // A restored guest would announce itself on its network with the address of the saved
        // guest.
        let card =
            format!("virtio-net-device,netdev=net,mac={UNCONFIGURED_MAC},guest_announce=off");
        arguments.add("-device", card);
    }
    arguments.0
}

/// Returns the drive of a volume slot. QEMU locks the file: if two VMs would write it, the second
/// does not start.
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

/// Returns the arguments that boot the machine.
pub(crate) fn boot_arguments(spec: &VmSpec, tsc_khz: Option<u64>) -> Vec<String> {
    let mut arguments = Arguments::default();
    arguments.add("-kernel", spec.kernel.to_string_lossy());
    arguments.add("-initrd", spec.initramfs.to_string_lossy());
    arguments.add("-append", kernel_command_line(spec, tsc_khz));
    arguments.0
}

/// Returns the arguments that make the machine wait for its state, and stay paused once it is
/// loaded.
pub(crate) fn restore_arguments() -> Vec<String> {
    ["-incoming", "defer", "-S"].map(str::to_owned).to_vec()
}

fn kernel_command_line(spec: &VmSpec, tsc_khz: Option<u64>) -> String {
    let tsc = tsc_khz.map(|khz| format!(" tsc_early_khz={khz} tsc=reliable")).unwrap_or_default();
    let waits = if spec.awaits_root { format!(" {AWAIT_ROOT}=1") } else { String::new() };
    // `hostname=` is the kernel's own parameter. A kernel that panics reboots at once, which ends
    // QEMU. The remaining security modules do nothing until a program uses them.
    format!(
        "console=ttyS0 earlyprintk=ttyS0,115200 quiet reboot=t panic=-1{tsc} lsm=landlock,yama,bpf audit=0 hostname={} rdinit=/lohar{waits}",
        spec.hostname
    )
}

/// Returns a path as the value of an option. An unescaped comma would end the value.
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
