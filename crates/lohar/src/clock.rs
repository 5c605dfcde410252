//! The kernel's wall clock and random number generator, which a restored guest must set anew.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// `RNDRESEEDCRNG` of linux/random.h: the generator takes a new key from the pool.
const RESEED: libc::c_ulong = 0x5207;

const SECOND_NS: u64 = 1_000_000_000;

/// Mixes the host's bytes into the pool, and only then makes the generator take its key from the
/// pool.
pub(crate) fn feed_random(entropy: &str) -> io::Result<()> {
    let bytes = STANDARD.decode(entropy).map_err(io::Error::other)?;
    let mut random = File::options().write(true).open("/dev/urandom")?;
    random.write_all(&bytes)?;
    // SAFETY: the request takes no argument.
    #[expect(unsafe_code, reason = "no safe wrapper of this ioctl exists")]
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RESEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Returns the wall clock, in nanoseconds since 1970.
pub(crate) fn clock() -> Option<u64> {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Realtime);
    Some(u64::try_from(tv_sec).ok()? * SECOND_NS + u64::try_from(tv_nsec).ok()?)
}

/// Sets the wall clock, in nanoseconds since 1970.
pub(crate) fn set_clock(wall_clock_ns: u64) -> io::Result<()> {
    let tv_sec = i64::try_from(wall_clock_ns / SECOND_NS).map_err(io::Error::other)?;
    let tv_nsec = i64::try_from(wall_clock_ns % SECOND_NS).map_err(io::Error::other)?;
    Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?)
}
