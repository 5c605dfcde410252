//! The machine that Firecracker runs.
//!
//! All paths are relative to Firecracker's own root directory, so a snapshot of one machine can
//! be restored for another.

use bhatti_engine::VmSpec;
use bhatti_vmm::UNCONFIGURED_MAC;
use serde_json::{Value, json};

/// Version of the machine. Changes with every change of the machine, including devices, their
/// order and the kernel's command line: a saved VM can only be restored on the machine that it
/// was saved on.
pub(crate) const LAYOUT: u32 = 1;

/// The boot files' names in Firecracker's root directory.
pub(crate) const KERNEL: &str = "kernel";
pub(crate) const INITRAMFS: &str = "initramfs";
/// The root disk.
pub(crate) const DISK: &str = "disk.ext4";
/// The host's vsock socket.
pub(crate) const VSOCK: &str = "vsock.sock";
/// Firecracker's id of the network card.
pub(crate) const CARD: &str = "net";

/// The guest's vsock address. Each Firecracker has its own socket on the host, so all guests can
/// share the address.
const GUEST_CID: u32 = 3;

/// Returns the API requests that configure and boot the guest, in order.
pub(crate) fn boot_requests(spec: &VmSpec) -> Vec<(String, Value)> {
    let mut requests = vec![
        (
            "/boot-source".to_owned(),
            json!({
                "kernel_image_path": KERNEL,
                "initrd_path": INITRAMFS,
                "boot_args": kernel_command_line(spec),
            }),
        ),
        (
            "/machine-config".to_owned(),
            json!({
                "vcpu_count": spec.cpus.get(),
                "mem_size_mib": spec.memory.get(),
                "track_dirty_pages": true,
            }),
        ),
        drive("root", DISK, false),
    ];
    for (slot, volume) in spec.volumes.iter().enumerate() {
        let read_only = volume.as_ref().is_some_and(|volume| volume.read_only);
        requests.push(drive(&format!("volume{slot}"), &volume_name(slot), read_only));
    }
    if let Some(tap) = &spec.tap {
        let card = json!({ "iface_id": CARD, "host_dev_name": tap, "guest_mac": UNCONFIGURED_MAC });
        requests.push((format!("/network-interfaces/{CARD}"), card));
    }
    requests.push(("/vsock".to_owned(), json!({ "guest_cid": GUEST_CID, "uds_path": VSOCK })));
    requests.push(("/actions".to_owned(), json!({ "action_type": "InstanceStart" })));
    requests
}

/// Returns the request for a disk whose writes are durable once the guest has flushed them.
fn drive(id: &str, path: &str, read_only: bool) -> (String, Value) {
    let drive = json!({
        "drive_id": id,
        "path_on_host": path,
        "is_root_device": false,
        "is_read_only": read_only,
        "cache_type": "Writeback",
    });
    (format!("/drives/{id}"), drive)
}

/// Returns the kernel's command line. It gives the disks' order, because Firecracker gives disks
/// no serials.
fn kernel_command_line(spec: &VmSpec) -> String {
    let volumes: String = (0..spec.volumes.len()).map(|slot| format!(",volume{slot}")).collect();
    format!(
        "console=ttyS0 quiet reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd lsm=landlock,yama,bpf audit=0 \
         hostname={} BHATTI_DISKS=root{volumes} rdinit=/lohar",
        spec.hostname
    )
}

pub(crate) fn volume_name(slot: usize) -> String {
    format!("volume{slot}.disk")
}
