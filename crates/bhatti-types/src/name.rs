//! Names that users choose: at most 63 characters, safe in a URL path, a file name and a shell.

use std::fmt;
use std::str::FromStr;

/// Maximum length of a name, in bytes (all of them ASCII).
const NAME_BYTES_MAX: usize = 63;
/// Maximum length of an image's name, which may be a reference, in bytes.
const REFERENCE_BYTES_MAX: usize = 255;
/// Maximum length of a name with a tag, in bytes.
const TAGGED_BYTES_MAX: usize = 128;

/// A string that cannot be a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {kind} name `{text}`: must match {}", pattern(.form))]
pub struct ParseNameError {
    kind: &'static str,
    text: String,
    form: Form,
}

/// The characters that a name may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Dotted,
    Dotless,
    /// Those of a name, and a tag after a colon.
    Tagged,
    /// Those of a reference to an image in a registry.
    Reference,
}

const fn pattern(form: &Form) -> &'static str {
    match form {
        Form::Dotted => "[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}",
        Form::Dotless => "[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}",
        Form::Tagged => "[a-zA-Z0-9][a-zA-Z0-9._:-]{0,127}",
        Form::Reference => "[a-zA-Z0-9][a-zA-Z0-9._/:@-]{0,254}",
    }
}

fn is_name(text: &str, form: Form) -> bool {
    let mut bytes = text.bytes();
    let bytes_max = match form {
        Form::Dotted | Form::Dotless => NAME_BYTES_MAX,
        Form::Tagged => TAGGED_BYTES_MAX,
        Form::Reference => REFERENCE_BYTES_MAX,
    };
    text.len() <= bytes_max
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| match b {
            b'_' | b'-' => true,
            b'.' => form != Form::Dotless,
            b':' => matches!(form, Form::Tagged | Form::Reference),
            b'/' | b'@' => form == Form::Reference,
            other => other.is_ascii_alphanumeric(),
        })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        name! { $(#[$doc])* $name, $kind, Form::Dotted }
    };
    ($(#[$doc:meta])* $name:ident, $kind:literal, $form:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.into()
            }
        }

        impl FromStr for $name {
            type Err = ParseNameError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if is_name(text, $form) {
                    Ok(Self(text.into()))
                } else {
                    // Do not repeat a name of megabytes in the error.
                    let text = text.chars().take(REFERENCE_BYTES_MAX + 1).collect();
                    Err(ParseNameError { kind: $kind, text, form: $form })
                }
            }
        }
    };
}

name! {
    /// The name of a sandbox, unique among its owner's sandboxes.
    SandboxName, "sandbox"
}

name! {
    /// The name of a snapshot, unique among its owner's snapshots.
    SnapshotName, "snapshot"
}

name! {
    /// The name of a user, unique on this daemon.
    UserName, "user"
}

name! {
    /// The name of an API key, unique among its owner's keys.
    KeyName, "key"
}

name! {
    /// The name of an image, unique on this daemon. The name of a pulled image is its whole
    /// reference, such as `docker.io/library/python:3.12-slim`.
    ImageName, "image", Form::Reference
}

name! {
    /// The name of a template that a user wrote, unique among its owner's templates. A colon
    /// separates a tag from it.
    TemplateName, "template", Form::Tagged
}

name! {
    /// The name of a volume, unique among its owner's volumes.
    VolumeName, "volume", Form::Dotless
}

/// A string that cannot be the name of a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid secret name `{text}`: it becomes an environment variable and must match [a-zA-Z_][a-zA-Z0-9_]{{0,62}}"
)]
pub struct ParseSecretNameError {
    text: String,
}

/// The name of a secret, unique among its owner's secrets. The secret's environment variable has
/// the same name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretName(Box<str>);

impl SecretName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SecretName {
    type Err = ParseSecretNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_name = text.len() <= NAME_BYTES_MAX
            && text.bytes().next().is_some_and(|first| !first.is_ascii_digit())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if is_name {
            Ok(Self(text.into()))
        } else {
            Err(ParseSecretNameError { text: text.chars().take(NAME_BYTES_MAX + 1).collect() })
        }
    }
}

/// Aliases that users could mistake for other services.
const RESERVED_ALIASES: [&str; 7] = ["www", "mail", "admin", "status", "ns1", "ns2", "api"];

/// A string that cannot be an alias.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid alias `{text}`: must match [a-z0-9][a-z0-9-]{{0,62}}, not end with `-` and be none of {}",
    RESERVED_ALIASES.join(", ")
)]
pub struct ParseAliasError {
    text: String,
}

/// The alias of a published port: a DNS label, unique on this daemon.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Alias(Box<str>);

impl Alias {
    /// The alias as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Alias {
    type Err = ParseAliasError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let is_alias = text.len() <= NAME_BYTES_MAX
            && text.bytes().next().is_some_and(plain)
            && text.bytes().last().is_some_and(plain)
            && text.bytes().all(|byte| plain(byte) || byte == b'-')
            && !RESERVED_ALIASES.contains(&text);
        if is_alias {
            Ok(Self(text.into()))
        } else {
            Err(ParseAliasError { text: text.chars().take(NAME_BYTES_MAX + 1).collect() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_names_are_accepted() {
        let longest = "x".repeat(63);

        for text in ["a", "my-sandbox", "dev.v2", "test_env", "0", &longest] {
            assert_eq!(text.parse::<SandboxName>().map(|n| n.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let too_long = "x".repeat(64);

        for text in ["", "my sandbox", "a\nb", "a/b", "-a", ".a", "..", "é", "a%2f", &too_long] {
            assert!(text.parse::<SandboxName>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn image_name_may_be_a_reference() {
        let longest = "x".repeat(255);
        for text in ["minimal", "localhost:5000/a/b:1.2", "a@sha256:00", &longest] {
            assert!(text.parse::<ImageName>().is_ok(), "{text:?}");
        }
        for text in ["", "/a", ".", "a b", "a\nb", "a%2f", &"x".repeat(256)] {
            assert!(text.parse::<ImageName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn volume_name_has_no_dots() {
        assert!("data_1-x".parse::<VolumeName>().is_ok());
        for text in ["data.1", "data.", "..", "a/b"] {
            let error = text.parse::<VolumeName>().unwrap_err().to_string();
            assert!(error.ends_with("must match [a-zA-Z0-9][a-zA-Z0-9_-]{0,62}"), "{error}");
        }
    }

    #[test]
    fn secret_name_is_a_variable_name_and_alias_is_a_host_label() {
        for (text, is_secret, is_alias) in [
            ("API_KEY", true, false),
            ("_x1", true, false),
            ("web-1", false, true),
            ("1web", false, true),
            ("a.b", false, false),
            ("web-", false, false),
            ("-web", false, false),
            ("api", true, false),
            ("", false, false),
            ("A=B", false, false),
        ] {
            assert_eq!(text.parse::<SecretName>().is_ok(), is_secret, "{text}");
            assert_eq!(text.parse::<Alias>().is_ok(), is_alias, "{text}");
        }
    }

    #[test]
    fn error_names_the_rule() {
        let error = "a/b".parse::<SandboxName>().unwrap_err();

        let rule = "invalid sandbox name `a/b`: must match [a-zA-Z0-9][a-zA-Z0-9._-]{0,62}";
        assert_eq!(error.to_string(), rule);
    }
}
