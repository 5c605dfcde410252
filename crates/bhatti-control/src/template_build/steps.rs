//! The steps of a template, and what they add up to.

use std::collections::BTreeMap;

use bhatti_types::{ENVIRONMENT_BYTES_MAX, Environment, ImageConfig, InvalidEnvironment};

use super::files::StepFiles;
use crate::build_errors::TemplateBuildError;

/// A step of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Runs a command of the shell.
    Run {
        /// The command.
        command: String,
        /// The user that runs it; that of the steps so far if absent.
        user: Option<String>,
    },
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
    /// Sets variables. `$NAME` and `${NAME}` in a value stand for what earlier steps and the image
    /// have set.
    ExpandedEnv(BTreeMap<String, String>),
    /// Sets the working directory, which is made if it is missing.
    Workdir(String),
    /// Sets the user.
    User(String),
}

impl Step {
    /// Describes the step in one line. A command that begins with a comment is described by it.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Run { command, .. } => {
                let line = command.lines().next().unwrap_or_default();
                line.strip_prefix("# ").map_or_else(|| format!("RUN {line}"), str::to_owned)
            }
            Self::Copy { from, to, .. } => format!("COPY {from} {to}"),
            Self::Env(variables) | Self::ExpandedEnv(variables) => {
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
            Self::Workdir(text) | Self::User(text) => vec![text],
            Self::Run { command, user } => {
                [command.as_str()].into_iter().chain(user.as_deref()).collect()
            }
            Self::Copy { from, to, user } => {
                [from.as_str(), to.as_str()].into_iter().chain(user.as_deref()).collect()
            }
            Self::Env(variables) | Self::ExpandedEnv(variables) => {
                variables.iter().flat_map(|(name, value)| [name.as_str(), value.as_str()]).collect()
            }
        }
    }

    /// Applies the step to the settings of the sandbox's processes. `base` is the environment of
    /// the template that this one begins with.
    ///
    /// # Errors
    ///
    /// Returns an error if the variables are not valid, or too long together.
    pub(super) fn apply(
        &self,
        base: &BTreeMap<String, String>,
        config: &mut ImageConfig,
    ) -> Result<(), InvalidEnvironment> {
        match self {
            Self::Run { .. } | Self::Copy { .. } => {}
            Self::Env(variables) => config.env.extend(variables.clone()),
            Self::ExpandedEnv(variables) => {
                let known = |name: &str| config.env.get(name).or_else(|| base.get(name)).cloned();
                let mut all = BTreeMap::new();
                let mut left = ENVIRONMENT_BYTES_MAX;
                for (name, value) in variables {
                    let value = expanded(value, &known, left)?;
                    left -= value.len();
                    all.insert(name.clone(), value);
                }
                let mut whole = config.env.clone();
                whole.extend(all);
                config.env = Environment::try_from(whole)?.into_map();
            }
            Self::Workdir(path) => config.workdir.clone_from(path),
            Self::User(user) => config.user.clone_from(user),
        }
        Ok(())
    }

    /// Whether the step changes the sandbox, and not only its settings.
    pub(super) fn changes_files(&self) -> bool {
        !matches!(self, Self::Env(_) | Self::ExpandedEnv(_) | Self::User(_))
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

/// Replaces `$NAME` and `${NAME}`. A variable that is not set is empty, and `\$` is a dollar sign.
///
/// # Errors
///
/// Returns an error if the text gets longer than `bytes_max`: variables that stand for others can
/// double at every step.
fn expanded(
    value: &str,
    known: &impl Fn(&str) -> Option<String>,
    bytes_max: usize,
) -> Result<String, InvalidEnvironment> {
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let (mut text, mut rest) = (String::new(), value);
    let check = |text: &str| {
        let bytes = text.len();
        if bytes > bytes_max { Err(InvalidEnvironment::TooLong { bytes }) } else { Ok(()) }
    };
    while let Some(at) = rest.find('$') {
        let (before, after) = (&rest[..at], &rest[at + 1..]);
        if let Some(before) = before.strip_suffix('\\') {
            text.extend([before, "$"]);
            rest = after;
            continue;
        }
        text.push_str(before);
        let braced = after.strip_prefix('{').and_then(|after| after.split_once('}'));
        let end = after.find(|letter| !is_name(letter)).unwrap_or(after.len());
        let (name, left) = braced.unwrap_or_else(|| after.split_at(end));
        if name.is_empty() || !name.chars().all(is_name) {
            text.push('$');
            rest = after;
            continue;
        }
        text.push_str(&known(name).unwrap_or_default());
        check(&text)?;
        rest = left;
    }
    text.push_str(rest);
    check(&text)?;
    Ok(text)
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
        let run = |text: &str| Step::Run { command: text.to_owned(), user: None };
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
    fn variables_that_double_at_each_step_are_refused() {
        let mut config = ImageConfig::default();
        config.env.insert("A".to_owned(), "x".repeat(1 << 10));
        let double = Step::ExpandedEnv([("A".to_owned(), "$A$A".to_owned())].into());
        let doubled = (0..100).map(|_| double.apply(&BTreeMap::new(), &mut config));
        let refused = doubled.filter_map(Result::err).next().unwrap();
        assert!(matches!(refused, InvalidEnvironment::TooLong { .. }), "{refused}");
        assert!(config.env["A"].len() <= ENVIRONMENT_BYTES_MAX);

        let many = Step::ExpandedEnv([("B".to_owned(), "$A".repeat(10_000))].into());
        let refused = many.apply(&BTreeMap::new(), &mut config).unwrap_err();
        let InvalidEnvironment::TooLong { bytes } = refused else { panic!("{refused}") };
        assert!(bytes <= 2 * ENVIRONMENT_BYTES_MAX, "{bytes}");
    }

    #[test]
    fn settings_add_up() {
        let mut config = ImageConfig { user: "app".to_owned(), ..ImageConfig::default() };
        config.env.insert("A".to_owned(), "0".to_owned());
        let base = BTreeMap::from([("BASE".to_owned(), "base".to_owned())]);
        for step in [
            Step::Env([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())].into()),
            Step::Workdir("/app".to_owned()),
            Step::ExpandedEnv([("C".to_owned(), "$A-${B}:$BASE/$NONE\\$A$ ${x".to_owned())].into()),
        ] {
            step.apply(&base, &mut config).unwrap();
        }
        assert_eq!((&*config.user, &*config.workdir), ("app", "/app"));
        assert_eq!(config.env["A"], "1");
        assert_eq!(config.env["C"], "1-2:base/$A$ ${x");
        assert_eq!(config.env.len(), 3);
    }
}
