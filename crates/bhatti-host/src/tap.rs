//! Taps: network interfaces of this host whose other end is a file descriptor.

use std::ffi::{c_short, c_uint};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::ioctl::{IntegerSetter, Opcode, Updater, ioctl};

const DEVICE: &str = "/dev/net/tun";

/// `TUNSETIFF`, `TUNSETPERSIST` and `TUNSETOWNER` of linux/if_tun.h.
const SET_INTERFACE: Opcode = 0x4004_54ca;
const SET_LASTING: Opcode = 0x4004_54cb;
const SET_OWNER: Opcode = 0x4004_54cc;

/// Flags of a tap: frames have no packet information header, but a virtio header, so that
/// checksums and segmentation of large frames are left to the other end.
const TAP: c_short = 0x0002;
const NO_HEADER: c_short = 0x1000;
const VIRTIO_HEADER: c_short = 0x4000;

/// Bytes of an interface's name, with the zero byte that ends it.
const NAME_BYTES: usize = 16;

/// `struct ifreq` of linux/if.h, as far as this request reads it.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES],
    flags: c_short,
    rest: [c_uint; 5],
}

/// Checks that a process with the rights to change networks can make taps.
///
/// # Errors
///
/// Returns the error of opening the device.
pub fn check() -> io::Result<()> {
    File::options().read(true).write(true).open(DEVICE).map(drop)
}

/// Creates the tap `name`. It exists as long as the returned descriptor, or a duplicate of it, is
/// open. It is down and belongs to no bridge.
///
/// # Errors
///
/// Returns an error if the name is too long or taken, or if this process may not make taps.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open(DEVICE)?;
    let mut request =
        Request { name: [0; NAME_BYTES], flags: TAP | NO_HEADER | VIRTIO_HEADER, rest: [0; 5] };
    if name.is_empty() || name.len() >= NAME_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request is a whole `struct ifreq`, which is what this ioctl reads and writes.
    #[expect(unsafe_code, reason = "no safe wrapper of this ioctl exists")]
    unsafe {
        ioctl(&device, Updater::<SET_INTERFACE, _>::new(&mut request))?;
    }
    Ok(device.into())
}

/// Creates the tap `name`, which exists until it is [removed](remove) and which the user `owner`
/// may open.
///
/// # Errors
///
/// Returns an error if the name is too long, if another process has the tap open, or if this
/// process may not make taps.
pub fn create_lasting(name: &str, owner: u32) -> io::Result<()> {
    let tap = create(name)?;
    set::<SET_OWNER>(&tap, owner)?;
    set::<SET_LASTING>(&tap, 1)
}

/// Removes the tap `name`. Succeeds if there is no such tap.
///
/// # Errors
///
/// Returns an error if another process has the tap open.
pub fn remove(name: &str) -> io::Result<()> {
    set::<SET_LASTING>(&create(name)?, 0)
}

fn set<const REQUEST: Opcode>(tap: &OwnedFd, value: u32) -> io::Result<()> {
    // SAFETY: both requests take a number in place of a pointer.
    #[expect(unsafe_code, reason = "no safe wrapper of these ioctls exists")]
    unsafe {
        Ok(ioctl(tap, IntegerSetter::<REQUEST>::new_usize(value as usize))?)
    }
}

#[cfg(test)]
mod tests {
    use bhatti_testkit::skip;
    use rustix::io::Errno;

    use super::*;

    /// Runs `test` in a thread with its own network namespace.
    fn in_own_network(test: fn()) {
        let in_thread = move || match crate::namespace::enter_own_network() {
            Ok(()) => test(),
            Err(_) => skip("taps", "a network namespace needs root"),
        };
        std::thread::spawn(in_thread).join().unwrap();
    }

    fn is_there() -> bool {
        std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("bhtest0")
    }

    #[test]
    fn tap_exists_as_long_as_it_is_open() {
        in_own_network(|| {
            let tap = create("bhtest0").unwrap();
            assert!(is_there());
            let taken = create("bhtest0").unwrap_err();
            assert_eq!(taken.raw_os_error(), Some(Errno::BUSY.raw_os_error()));
            drop(tap);
            assert!(!is_there());
            assert!(create("a-name-too-long0").is_err() && create("").is_err());
        });
    }

    #[test]
    fn lasting_tap_exists_until_it_is_removed() {
        in_own_network(|| {
            create_lasting("bhtest0", 4711).unwrap();
            assert!(is_there());
            let opened = create("bhtest0").unwrap();
            assert!(remove("bhtest0").is_err(), "the tap is still open");
            drop(opened);
            assert!(is_there());
            remove("bhtest0").unwrap();
            assert!(!is_there());
            remove("bhtest0").unwrap();
        });
    }
}
