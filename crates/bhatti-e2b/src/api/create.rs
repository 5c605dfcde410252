//! Creating sandboxes.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bhatti_control::{CreateError, ImageError, PullPolicy, SandboxRequest, SnapshotOpError};
use bhatti_store::{Attach, AttachKind};
use bhatti_types::{DEFAULT_IMAGE, Environment, Labels, NetworkMode, OnTimeout, UserId};
use serde::Deserialize;
use serde_json::Value;

use super::{Json, Owner, objects};
use crate::settings::{Settings, TIMEOUT_SEC};
use crate::{E2b, Error, status};

/// Seconds until a sandbox of the older route ends, if the request names no time.
const TIMEOUT_V1_SEC: u32 = 15;

/// The template that every program may expect.
pub(super) const BASE: &str = "base";

/// All networks, as SDKs write them.
const ALL_TRAFFIC: &str = "0.0.0.0/0";

/// A request to create a sandbox.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct NewSandbox {
    #[serde(rename = "templateID")]
    template_id: String,
    timeout: Option<i64>,
    metadata: Option<BTreeMap<String, String>>,
    env_vars: Option<BTreeMap<String, String>>,
    auto_pause: bool,
    auto_pause_memory: Option<bool>,
    auto_resume: Option<AutoResume>,
    #[serde(rename = "allow_internet_access")]
    allow_internet_access: Option<bool>,
    network: Option<Value>,
    volume_mounts: Option<Vec<VolumeMount>>,
    mcp: Option<Value>,
    iam: Option<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AutoResume {
    enabled: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct VolumeMount {
    name: String,
    path: String,
}

/// `POST /v2/sandboxes`.
pub(super) async fn create(
    State(e2b): State<E2b>,
    owner: Owner,
    Json(new): Json<NewSandbox>,
) -> Result<Response, Error> {
    create_with(e2b, owner, new, TIMEOUT_SEC).await
}

/// `POST /sandboxes`.
pub(super) async fn create_v1(
    State(e2b): State<E2b>,
    owner: Owner,
    Json(new): Json<NewSandbox>,
) -> Result<Response, Error> {
    create_with(e2b, owner, new, TIMEOUT_V1_SEC).await
}

async fn create_with(
    e2b: E2b,
    Owner(owner): Owner,
    new: NewSandbox,
    default_sec: u32,
) -> Result<Response, Error> {
    let timeout_sec = seconds(new.timeout.unwrap_or_else(|| default_sec.into()))?;
    if timeout_sec == 0 {
        return Err(Error::bad_request("timeout must be at least 1 second"));
    }
    for (what, given) in [("mcp", &new.mcp), ("iam", &new.iam)] {
        if given.as_ref().is_some_and(|value| !value.is_null()) {
            return Err(not_offered(what));
        }
    }
    let network = Network::of(new.network.as_ref(), new.allow_internet_access)?;
    let keeps_memory = new.auto_pause_memory.unwrap_or(true);
    let settings = Settings {
        template: new.template_id.clone(),
        metadata: new.metadata.unwrap_or_default(),
        timeout_sec,
        auto_resume: new.auto_resume.is_some_and(|auto_resume| auto_resume.enabled),
        keeps_memory,
        is_disk_only: !keeps_memory,
        public_traffic: network.public_traffic,
        internet: new.allow_internet_access,
        network: new.network,
    };
    let annex = settings.checked_annex()?;
    let mut request = template(&e2b, owner, &new.template_id)?;
    let mut environment = request.environment.into_map();
    environment.extend(new.env_vars.unwrap_or_default());
    request.environment = Environment::try_from(environment)
        .map_err(|error| Error::bad_request(format!("envVars: {error}")))?;
    request.labels = labels(&settings.metadata);
    request.lifetime = Some(Duration::from_secs(timeout_sec.into()));
    request.on_timeout = if new.auto_pause { OnTimeout::Stop } else { OnTimeout::Destroy };
    request.network = network.mode;
    request.volumes = volumes(new.volume_mounts.unwrap_or_default())?;
    request.annex = Some(annex);
    let created = e2b.0.control.create(owner, request).await;
    let row = created.map_err(|error| e2b.0.describe.creation(error))?;
    let body = axum::Json(objects::sandbox(&e2b, &row, &settings));
    Ok((status::CREATED, body).into_response())
}

/// Returns a number of seconds that a sandbox can live.
pub(super) fn seconds(number: i64) -> Result<u32, Error> {
    let invalid = || Error::bad_request(format!("invalid timeout {number}: it is in seconds"));
    u32::try_from(number).map_err(|_| invalid())
}

pub(super) fn not_offered(what: &str) -> Error {
    Error::bad_request(format!("`{what}` is not offered by this host"))
}

/// Returns what a template means: a template, a snapshot or an image of the owner's.
fn template(e2b: &E2b, owner: UserId, name: &str) -> Result<SandboxRequest, Error> {
    let control = &e2b.0.control;
    let untagged = name.strip_suffix(":default").unwrap_or(name);
    let found = control.find_template(owner, untagged);
    if let Some(row) = found.map_err(|error| e2b.0.describe.store(error))? {
        return Ok(row.into());
    }
    match control.find_snapshot(owner, untagged) {
        Ok(snapshot) => {
            return Ok(SandboxRequest { snapshot: Some(snapshot.id), ..SandboxRequest::default() });
        }
        Err(SnapshotOpError::NotFound(_)) => {}
        Err(error) => return Err(e2b.0.describe.snapshot(error)),
    }
    let image = match control.usable_image(owner, untagged) {
        Ok(image) => image.name().to_owned(),
        Err(ImageError::NotFound(_)) if untagged == BASE => DEFAULT_IMAGE.to_owned(),
        Err(ImageError::NotFound(_)) => {
            let message = format!("template {name:?} not found: no template, snapshot or image");
            return Err(Error::not_found(message));
        }
        Err(error) => return Err(e2b.0.describe.creation(CreateError::Image(error))),
    };
    let image =
        image.parse().map_err(|_| Error::not_found(format!("template {name:?} not found")))?;
    Ok(SandboxRequest { image: Some(image), pull: PullPolicy::Never, ..SandboxRequest::default() })
}

/// Returns the image of the template `base`.
pub(super) fn base(e2b: &E2b, owner: UserId) -> Result<String, Error> {
    match e2b.0.control.usable_image(owner, BASE) {
        Ok(image) => Ok(image.name().to_owned()),
        Err(ImageError::NotFound(_)) => Ok(DEFAULT_IMAGE.to_owned()),
        Err(error) => Err(e2b.0.describe.creation(CreateError::Image(error))),
    }
}

/// Returns the metadata that can be labels, so that the native API finds the sandbox by them.
fn labels(metadata: &BTreeMap<String, String>) -> Labels {
    let mut labels = Labels::default();
    for (key, value) in metadata {
        let change = BTreeMap::from([(key.clone(), Some(value.clone()))]);
        if let Ok(more) = labels.clone().changed(change) {
            labels = more;
        }
    }
    labels
}

fn volumes(mounts: Vec<VolumeMount>) -> Result<Vec<Attach>, Error> {
    let attach = |VolumeMount { name, path }: VolumeMount| {
        let invalid = |error: &dyn std::error::Error| Error::bad_request(error.to_string());
        Ok(Attach {
            name: name.parse().map_err(|error| invalid(&error))?,
            mount: path.parse().map_err(|error| invalid(&error))?,
            kind: AttachKind::Named { read_only: false },
        })
    };
    mounts.into_iter().map(attach).collect()
}

/// What a request says about the network.
pub(super) struct Network {
    pub(super) mode: Option<NetworkMode>,
    public_traffic: bool,
}

impl Network {
    /// # Errors
    ///
    /// Refuses rules that this host cannot enforce: a sandbox that its user believes to be cut off
    /// must not have a network.
    pub(super) fn of(network: Option<&Value>, internet: Option<bool>) -> Result<Self, Error> {
        let empty = serde_json::Map::new();
        let rules = network.and_then(Value::as_object).unwrap_or(&empty);
        let mut is_cut_off = internet == Some(false);
        let mut public_traffic = true;
        for (name, value) in rules {
            let is_empty = match value {
                Value::Null => true,
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            };
            match name.as_str() {
                _ if is_empty => {}
                "allowPublicTraffic" => public_traffic = value.as_bool() != Some(false),
                "denyOut" if value.as_array().is_some_and(|all| all.iter().all(is_all)) => {
                    is_cut_off = true;
                }
                name => return Err(not_offered(&format!("network.{name}"))),
            }
        }
        Ok(Self { mode: is_cut_off.then_some(NetworkMode::None), public_traffic })
    }
}

fn is_all(range: &Value) -> bool {
    range.as_str() == Some(ALL_TRAFFIC)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn network(network: &Value, internet: Option<bool>) -> Option<(Option<NetworkMode>, bool)> {
        let network = Network::of(Some(network), internet).ok()?;
        Some((network.mode, network.public_traffic))
    }

    #[test]
    fn network_rules_are_obeyed_or_refused() {
        let off = Some(NetworkMode::None);
        assert_eq!(network(&json!({}), None), Some((None, true)));
        assert_eq!(network(&json!({}), Some(true)), Some((None, true)));
        assert_eq!(
            network(&json!({ "allowOut": [], "rules": {} }), Some(false)),
            Some((off, true))
        );
        assert_eq!(network(&json!({ "denyOut": ["0.0.0.0/0"] }), None), Some((off, true)));
        assert_eq!(network(&json!({ "allowPublicTraffic": false }), None), Some((None, false)));
        for rules in [
            json!({ "denyOut": ["0.0.0.0/0"], "allowOut": ["1.1.1.1"] }),
            json!({ "denyOut": ["10.0.0.0/8"] }),
            json!({ "egressProxy": { "address": "x" } }),
            json!({ "maskRequestHost": "x" }),
        ] {
            assert_eq!(network(&rules, None), None, "{rules}");
        }
    }

    #[test]
    fn metadata_that_cannot_be_labels_is_left_out_of_them() {
        let mut metadata: BTreeMap<_, _> =
            (0..20).map(|n| (format!("key{n:02}"), "value".to_owned())).collect();
        metadata.insert("a key".to_owned(), "x".to_owned());
        metadata.insert("url".to_owned(), "https://x/?y".to_owned());
        metadata.insert("bhatti.sh/work".to_owned(), "build".to_owned());

        let labels = labels(&metadata);

        assert_eq!(labels.as_map().len(), 16);
        assert!(labels.as_map().keys().all(|key| key.starts_with("key")) && !labels.is_of_build());
    }
}
