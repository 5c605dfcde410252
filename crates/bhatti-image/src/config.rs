//! The configuration of an OCI or Docker image.
//!
//! Source: the OCI image specification, `config.md`. Absent lists are `null` where Docker wrote
//! the file.

use std::collections::BTreeMap;

use bhatti_types::ImageConfig;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

/// Maximum size of the settings that are kept of an image, in bytes of JSON.
const SETTINGS_BYTES_MAX: usize = 64 << 10;

/// A configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not the configuration of an image.
    #[error("the image's configuration is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A layer's digest is not SHA-256.
    #[error("the image's configuration names the layer `{0}`, which is not a SHA-256 digest")]
    Digest(String),
    /// A text cannot be a variable or an argument.
    #[error("the image's configuration has a zero byte in `{0}`")]
    ZeroByte(&'static str),
    /// The settings are too long.
    #[error(
        "the image's environment, labels and command have {bytes} bytes; at most {SETTINGS_BYTES_MAX} are allowed"
    )]
    TooLarge {
        /// Their length, as JSON.
        bytes: usize,
    },
}

/// The parts of a configuration that bhatti uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// What processes of the image's sandboxes get.
    pub image: ImageConfig,
    /// SHA-256 of the uncompressed layers in hexadecimal, lowest first.
    pub diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct Written {
    #[serde(default)]
    config: Option<Settings>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Settings {
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
    labels: Option<BTreeMap<String, String>>,
    shell: Option<Vec<String>>,
    stop_signal: Option<String>,
}

impl Configuration {
    /// Reads the JSON of a configuration.
    ///
    /// # Errors
    ///
    /// Returns an error that names what is wrong with it.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let Written { config, rootfs } = serde_json::from_slice(json)?;
        let diff_ids =
            rootfs.diff_ids.into_iter().map(|id| digest(&id).ok_or(ConfigError::Digest(id)));
        let diff_ids = diff_ids.collect::<Result<_, _>>()?;
        Ok(Self { image: settings(config.unwrap_or_default())?, diff_ids })
    }
}

/// Writes a configuration, with the SHA-256 of its uncompressed layers.
pub(crate) fn compose(config: &ImageConfig, diff_ids: &[String]) -> Vec<u8> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let diff_ids: Vec<String> = diff_ids.iter().map(|id| format!("sha256:{id}")).collect();
    let env: Vec<String> = config.env.iter().map(|(name, it)| format!("{name}={it}")).collect();
    let ports: BTreeMap<_, _> = config.exposed_ports.iter().map(|port| (port, json!({}))).collect();
    let settings = json!({
        "Env": env, "User": config.user, "WorkingDir": config.workdir,
        "Entrypoint": config.entrypoint, "Cmd": config.cmd, "ExposedPorts": ports,
        "Labels": config.labels, "Shell": config.shell, "StopSignal": config.stop_signal,
    });
    // Absent settings are left out.
    let is_set = |value: &Value| match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => false,
    };
    let settings = settings.as_object().into_iter().flatten().filter(|(_, value)| is_set(value));
    let settings: BTreeMap<_, _> = settings.collect();
    // Builders find their cached layers by the history of an image. Buildah compares the times in
    // it, and finds none if they are absent. Equal files make equal images, so no time is told.
    let created = "1970-01-01T00:00:00Z";
    let entry = json!({ "created": created, "created_by": "bhatti" });
    let history = vec![entry; diff_ids.len()];
    let whole = json!({
        "created": created,
        "architecture": architecture, "os": "linux", "config": settings, "history": history,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    whole.to_string().into_bytes()
}

/// Returns the hexadecimal part of a SHA-256 digest.
fn digest(text: &str) -> Option<String> {
    let hex = text.strip_prefix("sha256:")?;
    let is_digest = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_digest.then(|| hex.to_ascii_lowercase())
}

fn settings(settings: Settings) -> Result<ImageConfig, ConfigError> {
    // An entry without a value names a variable that the builder did not have.
    let variables = settings.env.unwrap_or_default().into_iter().filter_map(|entry| {
        let (name, value) = entry.split_once('=')?;
        (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
    });
    let config = ImageConfig {
        env: variables.collect(),
        // Without a user, processes are root's, also where the image has the usual user.
        user: or(settings.user, "0"),
        workdir: or(settings.working_dir, "/"),
        entrypoint: settings.entrypoint.unwrap_or_default(),
        cmd: settings.cmd.unwrap_or_default(),
        exposed_ports: settings.exposed_ports.unwrap_or_default().into_keys().collect(),
        labels: settings.labels.unwrap_or_default(),
        shell: settings.shell.unwrap_or_default(),
        stop_signal: settings.stop_signal.unwrap_or_default(),
    };
    check(&config)?;
    Ok(config)
}

/// Returns a text, or another one in place of an absent or empty text.
fn or(text: Option<String>, other: &str) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| other.to_owned())
}

/// Refuses settings that no process can have, or that are too long.
fn check(config: &ImageConfig) -> Result<(), ConfigError> {
    let bytes = serde_json::to_vec(config)?.len();
    if bytes > SETTINGS_BYTES_MAX {
        return Err(ConfigError::TooLarge { bytes });
    }
    let has_zero = |text: &String| text.contains('\0');
    let parts = [
        ("Env", config.env.iter().any(|(name, value)| has_zero(name) || has_zero(value))),
        ("User", has_zero(&config.user)),
        ("WorkingDir", has_zero(&config.workdir)),
        ("Entrypoint", config.entrypoint.iter().any(has_zero)),
        ("Cmd", config.cmd.iter().any(has_zero)),
    ];
    match parts.iter().find(|(_, has_zero)| *has_zero) {
        Some((part, _)) => Err(ConfigError::ZeroByte(part)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(config: &serde_json::Value) -> Result<Configuration, ConfigError> {
        let id = format!("sha256:{}", "ab".repeat(32));
        let whole = json!({ "config": config, "rootfs": { "type": "layers", "diff_ids": [id] } });
        Configuration::parse(whole.to_string().as_bytes())
    }

    #[test]
    fn every_setting_is_read() {
        let found = parse(&json!({
            "Env": ["PATH=/bin", "A=b=c", "NAME", "=x"], "User": "app:app", "WorkingDir": "/srv",
            "Entrypoint": ["/app"], "Cmd": ["serve"], "ExposedPorts": { "80/tcp": {}, "53/udp": {} },
            "Labels": { "k": "v" }, "Shell": ["/bin/bash", "-c"], "StopSignal": "SIGINT",
            "Volumes": { "/data": {} }
        }))
        .unwrap();

        let pairs = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        let words =
            |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let expected = ImageConfig {
            env: pairs(&[("PATH", "/bin"), ("A", "b=c")]),
            user: "app:app".to_owned(),
            workdir: "/srv".to_owned(),
            entrypoint: words(&["/app"]),
            cmd: words(&["serve"]),
            exposed_ports: words(&["53/udp", "80/tcp"]),
            labels: pairs(&[("k", "v")]),
            shell: words(&["/bin/bash", "-c"]),
            stop_signal: "SIGINT".to_owned(),
        };
        let diff_ids = vec!["ab".repeat(32)];
        let expected = Configuration { image: expected, diff_ids };
        assert_eq!(found, expected);
        let written = compose(&expected.image, &expected.diff_ids);
        assert_eq!(Configuration::parse(&written).unwrap(), expected);
    }

    #[test]
    fn absent_settings_mean_root_in_the_root_directory() {
        let expected =
            ImageConfig { user: "0".to_owned(), workdir: "/".to_owned(), ..ImageConfig::default() };
        for config in [json!(null), json!({}), json!({ "Env": null, "Cmd": null, "Labels": null })]
        {
            assert_eq!(parse(&config).unwrap().image, expected, "{config}");
        }
    }

    #[test]
    fn settings_that_no_process_can_have_are_refused() {
        for (config, part) in [
            (json!({ "Env": ["A=\0"] }), "Env"),
            (json!({ "Cmd": ["a\0b"] }), "Cmd"),
            (json!({ "User": "\0" }), "User"),
        ] {
            let error = parse(&config).unwrap_err();
            assert!(matches!(error, ConfigError::ZeroByte(found) if found == part), "{error}");
        }
        let long = json!({ "Labels": { "k": "v".repeat(SETTINGS_BYTES_MAX) } });
        assert!(matches!(parse(&long), Err(ConfigError::TooLarge { .. })));
        assert!(matches!(parse(&json!({ "Env": 5 })), Err(ConfigError::Malformed(_))));
        let other = json!({ "rootfs": { "diff_ids": ["sha512:00"] } }).to_string();
        assert!(matches!(Configuration::parse(other.as_bytes()), Err(ConfigError::Digest(_))));
    }
}
