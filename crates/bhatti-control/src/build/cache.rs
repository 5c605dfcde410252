//! The volume that keeps the layers of a user's builds.

use bhatti_store::VolumeError;
use bhatti_types::{UserId, VolumeMib, VolumeName};

use crate::Control;
use crate::volumes::VolumeOpError;

/// Where a build's sandbox has the volume.
pub(super) const MOUNT: &str = "/build";

/// Name of the volume.
const NAME: &str = "build-cache";

/// Sizes of the volume, in MiB. It gets the first one that the owner's quota allows. A volume takes
/// disk space for what is written to it.
const SIZES_MIB: [u64; 4] = [16 << 10, 8 << 10, 4 << 10, 2 << 10];

impl Control {
    /// Returns the name of the volume of a user's builds, which is made if it is missing.
    pub(super) async fn build_cache(&self, owner: UserId) -> Result<VolumeName, VolumeOpError> {
        let name: VolumeName =
            NAME.parse().map_err(|_| VolumeOpError::NotFound(NAME.to_owned()))?;
        let mut refused = VolumeOpError::NotFound(NAME.to_owned());
        for size in SIZES_MIB {
            if self.inner.store.find_volume(owner, NAME)?.is_some() {
                return Ok(name);
            }
            let Ok(size) = VolumeMib::try_from(size) else { continue };
            match self.create_volume(owner, name.clone(), size).await {
                Ok(_) | Err(VolumeOpError::Refused(VolumeError::NameTaken(_))) => return Ok(name),
                Err(error @ VolumeOpError::Refused(VolumeError::Quota(_))) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }
}
