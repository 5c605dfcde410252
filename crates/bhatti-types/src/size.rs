//! Sizes of a VM, each with the range that engines support.

use std::fmt;

/// A number outside the range of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be between {minimum} and {maximum}, not {value}")]
pub struct OutOfRange {
    what: &'static str,
    value: u64,
    minimum: u64,
    maximum: u64,
}

/// Virtual CPUs of a VM: 1 to 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuCount(u8);

impl CpuCount {
    /// One vCPU, the default.
    pub const ONE: Self = Self(1);
    const MAX: u8 = 32;

    /// The number of vCPUs.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u64> for CpuCount {
    type Error = OutOfRange;

    fn try_from(value: u64) -> Result<Self, OutOfRange> {
        match u8::try_from(value) {
            Ok(count @ 1..=Self::MAX) => Ok(Self(count)),
            _ => Err(OutOfRange { what: "cpus", value, minimum: 1, maximum: u64::from(Self::MAX) }),
        }
    }
}

impl fmt::Display for CpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A size in mebibytes (2^20 bytes), with the range that engines support. `$field` is its name in
/// a request.
macro_rules! mebibytes {
    ($(#[$doc:meta])* $name:ident, $field:literal, $minimum:expr, $maximum:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u32);

        impl $name {
            const MIN: u32 = $minimum;
            const MAX: u32 = $maximum;

            /// The size in mebibytes.
            #[must_use]
            pub const fn get(self) -> u32 {
                self.0
            }

            /// The size in bytes.
            #[must_use]
            pub const fn bytes(self) -> u64 {
                (self.0 as u64) << 20
            }
        }

        impl TryFrom<u64> for $name {
            type Error = OutOfRange;

            fn try_from(value: u64) -> Result<Self, OutOfRange> {
                match u32::try_from(value) {
                    Ok(mib @ Self::MIN..=Self::MAX) => Ok(Self(mib)),
                    _ => Err(OutOfRange {
                        what: $field,
                        value,
                        minimum: u64::from(Self::MIN),
                        maximum: u64::from(Self::MAX),
                    }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} MiB", self.0)
            }
        }
    };
}

mebibytes! {
    /// Guest memory: 128 MiB to 256 GiB. Debian's kernel does not boot with less.
    MemoryMib, "memory_mb", 128, 256 << 10
}

impl MemoryMib {
    /// The default, 512 MiB.
    pub const DEFAULT: Self = Self(512);
}

mebibytes! {
    /// A root disk: 256 MiB to 4 TiB, which is the most that an overlay of a disk addresses.
    DiskMib, "disk_mb", 256, 4 << 20
}

mebibytes! {
    /// A volume: 16 MiB, the smallest size that has room for a journal, to 16 TiB.
    VolumeMib, "size_mb", 16, 16 << 20
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_each_range_are_accepted() {
        assert_eq!(CpuCount::try_from(1).map(CpuCount::get), Ok(1));
        assert_eq!(CpuCount::try_from(32).map(CpuCount::get), Ok(32));
        assert_eq!(MemoryMib::try_from(128).map(MemoryMib::bytes), Ok(134_217_728));
        assert_eq!(MemoryMib::try_from(262_144).map(MemoryMib::get), Ok(262_144));
        assert_eq!(DiskMib::try_from(256).map(DiskMib::bytes), Ok(256 << 20));
        assert_eq!(DiskMib::try_from(4 << 20).map(DiskMib::bytes), Ok(4 << 40));
        assert_eq!(VolumeMib::try_from(16).map(VolumeMib::bytes), Ok(16 << 20));
        assert_eq!(VolumeMib::try_from(16 << 20).map(VolumeMib::get), Ok(16 << 20));
    }

    #[test]
    fn numbers_beyond_each_range_are_refused() {
        for cpus in [0, 33, 10_000, u64::MAX] {
            assert!(CpuCount::try_from(cpus).is_err(), "{cpus} cpus");
        }
        for mib in [0, 3, 127, 262_145, 10 << 20, u64::MAX] {
            assert!(MemoryMib::try_from(mib).is_err(), "{mib} MiB");
        }
        for mib in [0, 255, (4 << 20) + 1, u64::MAX] {
            assert!(DiskMib::try_from(mib).is_err(), "{mib} MiB");
        }
        for mib in [0, 15, (16 << 20) + 1, u64::MAX] {
            assert!(VolumeMib::try_from(mib).is_err(), "{mib} MiB");
        }
    }

    #[test]
    fn error_names_the_range() {
        let error = CpuCount::try_from(10_000).unwrap_err();

        assert_eq!(error.to_string(), "cpus must be between 1 and 32, not 10000");
    }
}
