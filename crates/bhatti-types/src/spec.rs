//! What a sandbox is asked to be.

use std::collections::BTreeMap;

use crate::{
    CpuCount, DiskMib, ImageName, Labels, MemoryMib, NetworkSpec, SandboxName, SecretName,
};

/// The image of sandboxes whose requests name none.
pub const DEFAULT_IMAGE: &str = "minimal";

/// The most content that the files of a new sandbox have together, in bytes.
pub const NEW_FILES_BYTES_MAX: usize = 16 << 20;

/// The longest environment, in bytes, counted as a process has it. With a command of the largest request body it fits one frame.
const ENVIRONMENT_BYTES_MAX: usize = 128 * 1024;

/// An environment that no process could have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEnvironment {
    /// A variable's name is empty or holds `=` or NUL.
    #[error("invalid environment variable name {name:?}: it must not be empty nor hold `=` or NUL")]
    Name {
        /// The name as given.
        name: String,
    },
    /// All variables together are too long.
    #[error(
        "the environment has {bytes} bytes; at most {ENVIRONMENT_BYTES_MAX} are passed to processes"
    )]
    TooLong {
        /// Their length.
        bytes: usize,
    },
    /// A variable's value holds NUL.
    #[error("invalid value of environment variable `{name}`: it must not hold NUL")]
    Value {
        /// The variable whose value it is.
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

    /// Gives the variables away.
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

/// What a sandbox was asked to be, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxSpec {
    /// Its name.
    pub name: SandboxName,
    /// Its vCPUs.
    pub cpus: CpuCount,
    /// Its memory.
    pub memory: MemoryMib,
    /// The size of its root disk; that of its image if absent.
    pub disk: Option<DiskMib>,
    /// The environment of every process that is started in it.
    pub environment: Environment,
    /// Whether it stays hot, however long nobody uses it.
    pub keep_hot: bool,
    /// What is noted on it.
    pub labels: Labels,
    /// The secrets that are variables of its environment, too.
    pub secrets: Vec<SecretName>,
    /// A script that runs when it has booted; none if empty.
    pub init: String,
    /// The image that its disk began as.
    pub image: ImageName,
    /// How it is connected.
    pub network: NetworkSpec,
}

impl SandboxSpec {
    /// One of which nothing else was asked: a processor, the usual memory, the usual network.
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
            network: NetworkSpec::default(),
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
    fn any_text_without_nul_is_a_value() {
        for value in ["", "a=b", "two\nlines", "'\"", "é"] {
            assert!(environment("K", value).is_ok(), "{value:?}");
        }
    }

    #[test]
    fn impossible_variables_are_refused() {
        assert_eq!(environment("", "v"), Err(InvalidEnvironment::Name { name: String::new() }));
        assert_eq!(environment("A=B", "v"), Err(InvalidEnvironment::Name { name: "A=B".into() }));
        assert_eq!(environment("K", "a\0b"), Err(InvalidEnvironment::Value { name: "K".into() }));
    }
}
