//! The steps of a template, and what they add up to.

use std::collections::BTreeMap;

use bhatti_types::ImageConfig;

use super::files::StepFiles;
use crate::build_errors::TemplateBuildError;

/// A step of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Runs a command of the image's shell.
    Run(String),
    /// Copies a file or the content of a directory from the archive.
    Copy {
        /// The path in the archive; `.` for all of it.
        from: String,
        /// The path in the sandbox. A file is put into it if it ends with `/`.
        to: String,
        /// The user that the files belong to; root if absent.
        user: Option<String>,
    },
    /// Sets variables of the environment.
    Env(BTreeMap<String, String>),
    /// Sets the working directory, which is made if it is missing.
    Workdir(String),
    /// Sets the user.
    User(String),
}

impl Step {
    /// Describes the step in one line.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Run(command) => format!("RUN {}", command.lines().next().unwrap_or_default()),
            Self::Copy { from, to, .. } => format!("COPY {from} {to}"),
            Self::Env(variables) => {
                let names: Vec<&str> = variables.keys().map(String::as_str).collect();
                format!("ENV {}", names.join(" "))
            }
            Self::Workdir(path) => format!("WORKDIR {path}"),
            Self::User(user) => format!("USER {user}"),
        }
    }

    /// Returns all texts of the step.
    pub(super) fn texts(&self) -> Vec<&str> {
        match self {
            Self::Run(text) | Self::Workdir(text) | Self::User(text) => vec![text],
            Self::Copy { from, to, user } => {
                [from.as_str(), to.as_str()].into_iter().chain(user.as_deref()).collect()
            }
            Self::Env(variables) => {
                variables.iter().flat_map(|(name, value)| [name.as_str(), value.as_str()]).collect()
            }
        }
    }

    /// Applies the step to the settings of the sandbox's processes.
    pub(super) fn apply(&self, config: &mut ImageConfig) {
        match self {
            Self::Run(_) | Self::Copy { .. } => {}
            Self::Env(variables) => config.env.extend(variables.clone()),
            Self::Workdir(path) => config.workdir.clone_from(path),
            Self::User(user) => config.user.clone_from(user),
        }
    }

    /// Whether the step changes the sandbox, and not only its settings.
    pub(super) fn changes_files(&self) -> bool {
        !matches!(self, Self::Env(_) | Self::User(_))
    }

    /// Returns the key of the state after this step, which began with the state of key `before`.
    pub(super) fn key(
        &self,
        before: &str,
        files: Option<&StepFiles>,
    ) -> Result<String, TemplateBuildError> {
        let content = match self {
            Self::Copy { from, .. } => files.ok_or(TemplateBuildError::NoFiles)?.digest(from)?,
            _ => String::new(),
        };
        Ok(key(&[before, &format!("{self:?}"), &content]))
    }
}

/// Returns a key of texts, in hexadecimal.
pub(super) fn key(texts: &[&str]) -> String {
    let mut hash = blake3::Hasher::new();
    for text in texts {
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    hash.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_all_earlier_steps() {
        let keys = |steps: &[Step]| {
            let mut last = key(&["base"]);
            for step in steps {
                last = step.key(&last, None).unwrap();
            }
            last
        };
        let run = |text: &str| Step::Run(text.to_owned());
        let env = Step::Env([("A".to_owned(), "1".to_owned())].into());
        let whole = keys(&[env.clone(), run("a"), run("b")]);
        assert_eq!(keys(&[env.clone(), run("a"), run("b")]), whole);
        for other in [
            &[run("a"), run("b")][..],
            &[env.clone(), run("b"), run("a")],
            &[env.clone(), run("a"), run("b"), Step::User("b".to_owned())],
            &[env, run("a b")],
        ] {
            assert_ne!(keys(other), whole);
        }
    }

    #[test]
    fn settings_add_up() {
        let mut config = ImageConfig { user: "app".to_owned(), ..ImageConfig::default() };
        config.env.insert("A".to_owned(), "0".to_owned());
        for step in [
            Step::Env([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())].into()),
            Step::Workdir("/app".to_owned()),
            Step::Run("true".to_owned()),
        ] {
            step.apply(&mut config);
        }
        assert_eq!((&*config.user, &*config.workdir), ("app", "/app"));
        assert_eq!(config.env["A"], "1");
        assert_eq!(config.env.len(), 2);
    }
}
