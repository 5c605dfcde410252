//! Taps: interfaces of this host whose other end is a file descriptor.

use std::ffi::{c_short, c_uint};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::ioctl::{Opcode, Updater, ioctl};

const DEVICE: &str = "/dev/net/tun";

/// `TUNSETIFF` of linux/if_tun.h.
const SET_INTERFACE: Opcode = 0x4004_54ca;

/// A tap, without a header of its own before each frame, with the one of virtio: checksums and large frames are left to who knows better.
const TAP: c_short = 0x0002;
const NO_HEADER: c_short = 0x1000;
const VIRTIO_HEADER: c_short = 0x4000;

/// The longest name of an interface, and the byte that ends it.
const NAME_BYTES: usize = 16;

/// `struct ifreq` of linux/if.h, as far as this request reads it.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES],
    flags: c_short,
    rest: [c_uint; 5],
}

/// Checks that there can be taps, for who may change networks.
///
/// # Errors
///
/// Returns the error of opening the device.
pub fn check() -> io::Result<()> {
    File::options().read(true).write(true).open(DEVICE).map(drop)
}

/// Makes the tap `name`. It is there as long as the answer, or a duplicate of it, is open; it is down and belongs to no bridge.
///
/// # Errors
///
/// Returns an error if the name is too long or taken, or this process may make none.
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

#[cfg(test)]
mod tests {
    use bhatti_testkit::skip;
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn tap_is_there_as_long_as_it_is_open() {
        let in_thread = || {
            if crate::namespace::enter_own_network().is_err() {
                skip("taps", "a network of one's own needs root");
                return;
            }
            let is_there = || {
                let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
                devices.contains("bhtest0")
            };
            let tap = create("bhtest0").unwrap();
            assert!(is_there());
            assert_eq!(
                create("bhtest0").unwrap_err().raw_os_error(),
                Some(Errno::BUSY.raw_os_error())
            );
            drop(tap);
            assert!(!is_there());
            assert!(create("a-name-too-long0").is_err() && create("").is_err());
        };
        std::thread::spawn(in_thread).join().unwrap();
    }
}
