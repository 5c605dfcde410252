//! The specification of a sandbox.

use std::collections::BTreeMap;

use crate::{
    CpuCount, DiskMib, ImageConfig, ImageName, Labels, MemoryMib, NetworkSpec, SandboxName,
    SecretName,
};

/// The image of sandboxes whose requests name none.
pub const DEFAULT_IMAGE: &str = "minimal";

/// The image of the sandboxes that build images.
pub const BUILDER_IMAGE: &str = "builder";

/// Maximum total content of the files of a new sandbox, in bytes.
pub const NEW_FILES_BYTES_MAX: usize = 16 << 20;

/// Maximum size of an environment, in bytes, counted as in a process. With a command of the
/// largest request body, an environment of this size fits one frame.
pub const ENVIRONMENT_BYTES_MAX: usize = 128 * 1024;

/// An environment that no process could have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEnvironment {
    /// A variable's name is empty, or contains `=` or NUL.
    #[error(
        "invalid environment variable name {name:?}: it must not be empty or contain `=` or NUL"
    )]
    Name {
        /// The name as given.
        name: String,
    },
    /// All variables together are too long.
    #[error(
        "the environment has {bytes} bytes; at most {ENVIRONMENT_BYTES_MAX} are passed to processes"
    )]
    TooLong {
        /// Size of the environment.
        bytes: usize,
    },
    /// A variable's value contains NUL.
    #[error("invalid value of environment variable `{name}`: it must not contain NUL")]
    Value {
        /// Name of the variable.
        name: String,
    },
}

/// Environment variables, in the order of their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// The variables.
    #[must_use]
    pub const fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// Converts the environment into a map.
    #[must_use]
    pub fn into_map(self) -> BTreeMap<String, String> {
        self.0
    }
}

impl TryFrom<BTreeMap<String, String>> for Environment {
    type Error = InvalidEnvironment;

    fn try_from(variables: BTreeMap<String, String>) -> Result<Self, InvalidEnvironment> {
        let bytes = variables.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        if bytes > ENVIRONMENT_BYTES_MAX {
            return Err(InvalidEnvironment::TooLong { bytes });
        }
        for (name, value) in &variables {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(InvalidEnvironment::Name { name: name.clone() });
            }
            if value.contains('\0') {
                return Err(InvalidEnvironment::Value { name: name.clone() });
            }
        }
        Ok(Self(variables))
    }
}

/// The checked specification of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxSpec {
    /// The sandbox's name.
    pub name: SandboxName,
    /// The sandbox's vCPUs.
    pub cpus: CpuCount,
    /// The sandbox's memory.
    pub memory: MemoryMib,
    /// Size of the root disk; the image's size if absent.
    pub disk: Option<DiskMib>,
    /// Environment of every process that is started in the sandbox.
    pub environment: Environment,
    /// Whether the sandbox stays hot, however long it is idle.
    pub keep_hot: bool,
    /// The sandbox's labels.
    pub labels: Labels,
    /// Secrets that become environment variables, too.
    pub secrets: Vec<SecretName>,
    /// A script that runs when the guest has booted; no script if empty.
    pub init: String,
    /// Image that the sandbox starts from.
    pub image: ImageName,
    /// What the image says about the sandbox's processes.
    pub image_config: ImageConfig,
    /// How the sandbox is connected.
    pub network: NetworkSpec,
    /// What a second API keeps with the sandbox, in JSON. Only that API knows its fields.
    pub annex: Option<String>,
}

impl SandboxSpec {
    /// Returns a specification with defaults: one vCPU, default memory, default network.
    #[must_use]
    pub fn plain(name: SandboxName, image: ImageName) -> Self {
        Self {
            name,
            cpus: CpuCount::ONE,
            memory: MemoryMib::DEFAULT,
            disk: None,
            environment: Environment::default(),
            keep_hot: false,
            labels: Labels::default(),
            secrets: Vec::new(),
            init: String::new(),
            image,
            image_config: ImageConfig::default(),
            network: NetworkSpec::default(),
            annex: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(name: &str, value: &str) -> Result<Environment, InvalidEnvironment> {
        Environment::try_from(BTreeMap::from([(name.to_owned(), value.to_owned())]))
    }

    #[test]
    fn text_without_nul_is_a_valid_value() {
        for value in ["", "a=b", "two\nlines", "'\"", "é"] {
            assert!(environment("K", value).is_ok(), "{value:?}");
        }
    }

    #[test]
    fn invalid_variables_are_refused() {
        assert_eq!(environment("", "v"), Err(InvalidEnvironment::Name { name: String::new() }));
        assert_eq!(environment("A=B", "v"), Err(InvalidEnvironment::Name { name: "A=B".into() }));
        assert_eq!(environment("K", "a\0b"), Err(InvalidEnvironment::Value { name: "K".into() }));
    }
}
