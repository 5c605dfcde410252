//! The frequency of the time stamp counter.
//!
//! A microVM has no timer against which its kernel could calibrate the counter, so the host
//! passes the frequency to the guest. Under software emulation and under KVM alike, the guest's
//! counter runs at the host's speed.

/// Measures the counter's frequency in kHz, against the monotonic raw clock. Returns `None` where
/// there is no such counter.
///
/// Blocks for a tenth of a second: the error is then a few parts per million.
#[must_use]
pub fn tsc_khz() -> Option<u64> {
    imp::tsc_khz()
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use rustix::thread::nanosleep;
    use rustix::time::{ClockId, Timespec, clock_gettime};

    const MEASURED_NS: i64 = 100_000_000;

    /// Reads both clocks, in counts and nanoseconds. Keeps the closest pair of a few attempts.
    fn reading() -> (u64, i128) {
        let attempt = || {
            // SAFETY: every 64-bit x86 processor has the instruction, and it touches no memory.
            #[expect(unsafe_code, reason = "the counter is read by an instruction")]
            let counter = || unsafe { core::arch::x86_64::_rdtsc() };
            let before = counter();
            let now = clock_gettime(ClockId::MonotonicRaw);
            let after = counter();
            (
                after - before,
                before.midpoint(after),
                i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec),
            )
        };
        let (_, counts, now) =
            (0..16).map(|_| attempt()).min_by_key(|(width, ..)| *width).unwrap_or_else(attempt);
        (counts, now)
    }

    pub(super) fn tsc_khz() -> Option<u64> {
        let (counts_before, before) = reading();
        // The two readings measure how long the thread really slept.
        drop(nanosleep(&Timespec { tv_sec: 0, tv_nsec: MEASURED_NS }));
        let (counts_after, after) = reading();
        let elapsed_ns = after.checked_sub(before).filter(|elapsed| *elapsed > 0)?;
        let counts = i128::from(counts_after.checked_sub(counts_before)?);
        u64::try_from(counts * 1_000_000 / elapsed_ns).ok()
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    pub(super) const fn tsc_khz() -> Option<u64> {
        None
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    #[test]
    fn two_measurements_agree_within_a_thousandth() {
        let (first, second) = (super::tsc_khz().unwrap(), super::tsc_khz().unwrap());

        assert!(first.abs_diff(second) < first / 1000, "{first} kHz, then {second} kHz");
    }
}
