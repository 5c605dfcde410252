//! Parses and checks requests about sandboxes.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_api::{CreateSandbox, ErrorCode, NewFile};
use bhatti_control::{FileRequest, PullPolicy, SandboxRequest};
use bhatti_store::{SandboxFilter, TemplateRow};
use bhatti_types::{
    Allowance, CpuCount, DiskMib, Environment, Labels, MemoryMib, OnTimeout, SandboxName,
    SecretName, TimeLimitChange, UnknownOnTimeout,
};

use super::ListQuery;
use crate::page::split_cursor;
use crate::routes::volumes::attachments;
use crate::status::ApiError;

/// Maximum number of secrets of one sandbox.
const SECRETS_MAX: usize = 64;

/// Maximum length of an init script, in bytes.
const INIT_BYTES_MAX: usize = 64 * 1024;

pub(in crate::routes) fn init(script: Option<String>) -> Result<Option<String>, ApiError> {
    match script {
        Some(script) if script.len() > INIT_BYTES_MAX || script.contains('\0') => {
            let message = format!("an init script has at most {INIT_BYTES_MAX} bytes and no NUL");
            Err(ApiError::new(ErrorCode::BadRequest, message)
                .hint("put the script into a file, and run that file"))
        }
        script => Ok(script),
    }
}

pub(in crate::routes) fn name(name: Option<String>) -> Result<Option<SandboxName>, ApiError> {
    name.map(|name| name.parse()).transpose().map_err(|error| ApiError::bad_request(&error))
}

pub(in crate::routes) fn labels(labels: BTreeMap<String, String>) -> Result<Labels, ApiError> {
    Labels::try_from(labels).map_err(|error| ApiError::bad_request(&error))
}

pub(in crate::routes) fn secrets(names: &[String]) -> Result<Vec<SecretName>, ApiError> {
    if names.len() > SECRETS_MAX {
        let message = format!("{} secrets exceed the maximum of {SECRETS_MAX}", names.len());
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    let mut secrets: Vec<SecretName> = Vec::new();
    for name in names {
        let name = name.parse().map_err(|error| ApiError::bad_request(&error))?;
        if !secrets.contains(&name) {
            secrets.push(name);
        }
    }
    Ok(secrets)
}

/// Returns the filter for a page, and for one sandbox more, which tells whether there is a next
/// page.
pub(super) fn filter(query: ListQuery) -> Result<SandboxFilter, ApiError> {
    let bad = |message: String| ApiError::new(ErrorCode::BadRequest, message);
    let ListQuery { label, limit, after } = query;
    let mut labels = BTreeMap::new();
    for label in &label {
        let Some((key, value)) = label.split_once('=') else {
            return Err(bad(format!("invalid label filter `{label}`: expected KEY=VALUE")));
        };
        if labels.insert(key.to_owned(), value.to_owned()).is_some_and(|other| other != value) {
            return Err(bad(format!("label filter `{key}` is given with two different values")));
        }
    }
    let after = after.as_deref().filter(|after| !after.is_empty());
    let after = after.map(split_cursor).transpose()?;
    let after = after.map(|(at, id)| (at.to_owned(), id.to_owned()));
    Ok(SandboxFilter { labels, limit: limit.map(|limit| limit + 1), after })
}

/// Combines a request with a template, which supplies the options that the request leaves out.
pub(super) fn create(
    request: CreateSandbox,
    template: Option<TemplateRow>,
) -> Result<SandboxRequest, ApiError> {
    let bad = |error: &dyn std::error::Error| ApiError::bad_request(error);
    let CreateSandbox {
        name: wanted_name,
        cpus,
        memory_mb,
        disk_mb,
        env,
        keep_hot,
        cold_boot,
        template: id_or_name,
        image,
        pull,
        start,
        init: wanted_init,
        files,
        secrets: wanted_secrets,
        labels: wanted_labels,
        timeout_sec,
        on_timeout: wanted_on_timeout,
        network,
        network_allow,
        volumes,
        new_volumes,
    } = request;
    let mut base = template.map(SandboxRequest::from).unwrap_or_default();
    // A sandbox that is created from a template is named after it.
    base.name = match name(wanted_name)? {
        Some(name) => Some(name),
        None => id_or_name.map(|id_or_name| named_after(&id_or_name)).transpose()?.flatten(),
    };
    if let Some(cpus) = cpus {
        base.cpus = Some(CpuCount::try_from(cpus).map_err(|error| bad(&error))?);
    }
    if let Some(memory) = memory_mb {
        base.memory = Some(MemoryMib::try_from(memory).map_err(|error| bad(&error))?);
    }
    if let Some(disk) = disk_mb {
        base.disk = Some(DiskMib::try_from(disk).map_err(|error| bad(&error))?);
    }
    if let Some(image) = image {
        base.image = Some(image.parse().map_err(|error| bad(&error))?);
    }
    base.pull = pull.as_deref().map(pull_policy).transpose()?.unwrap_or_default();
    if let Some(script) = init(wanted_init)? {
        base.init = script;
    }
    let mut environment = base.environment.into_map();
    environment.extend(env);
    base.environment = Environment::try_from(environment).map_err(|error| bad(&error))?;
    let mut all_labels = base.labels.into_map();
    all_labels.extend(wanted_labels);
    base.labels = labels(all_labels)?;
    for secret in secrets(&wanted_secrets)? {
        if !base.secrets.contains(&secret) {
            base.secrets.push(secret);
        }
    }
    if timeout_sec == Some(0) {
        return Err(ApiError::new(ErrorCode::BadRequest, "timeout_sec must be at least 1"));
    }
    Ok(SandboxRequest {
        keep_hot,
        cold_boot,
        start,
        files: files.into_iter().map(file).collect::<Result<_, _>>()?,
        network: network.map(|mode| mode.parse()).transpose().map_err(|error| bad(&error))?,
        allow: Allowance::parse(&network_allow).map_err(|error| bad(&error))?,
        volumes: attachments(volumes, new_volumes)?,
        lifetime: timeout_sec.map(|seconds| Duration::from_secs(seconds.into())),
        on_timeout: on_timeout(wanted_on_timeout.as_deref())?.unwrap_or_default(),
        ..base
    })
}

/// Returns a change of the time limit; 0 seconds remove it.
pub(super) fn time_limit(
    timeout_sec: Option<u32>,
    on_timeout_text: Option<&str>,
) -> Result<TimeLimitChange, ApiError> {
    let expires_at = |seconds: u32| {
        (seconds > 0)
            .then(|| bhatti_control::unix_seconds_after(Duration::from_secs(seconds.into())))
    };
    Ok(TimeLimitChange {
        expires_at: timeout_sec.map(expires_at),
        on_timeout: on_timeout(on_timeout_text)?,
        ..TimeLimitChange::default()
    })
}

fn on_timeout(text: Option<&str>) -> Result<Option<OnTimeout>, ApiError> {
    text.map(str::parse)
        .transpose()
        .map_err(|error: UnknownOnTimeout| ApiError::bad_request(&error))
}

pub(in crate::routes) fn pull_policy(text: &str) -> Result<PullPolicy, ApiError> {
    match text {
        "missing" => Ok(PullPolicy::Missing),
        "always" => Ok(PullPolicy::Always),
        "never" => Ok(PullPolicy::Never),
        other => {
            let message = format!("pull must be `missing`, `always` or `never`, not `{other}`");
            Err(ApiError::new(ErrorCode::BadRequest, message))
        }
    }
}

/// Returns the template's name and six hex digits, if that is a valid name.
fn named_after(template: &str) -> Result<Option<SandboxName>, ApiError> {
    let digits = getrandom::u32()? & 0xff_ffff;
    Ok(format!("{template}-{digits:06x}").parse().ok())
}

fn file(file: NewFile) -> Result<FileRequest, ApiError> {
    let NewFile { path, content, content_base64, mode } = file;
    let bad =
        |what: &str| ApiError::new(ErrorCode::BadRequest, format!("invalid file `{path}`: {what}"));
    let content = match (content, content_base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(encoded)) => {
            STANDARD.decode(encoded).map_err(|_| bad("its content_base64 is not base64"))?
        }
        (None, None) | (Some(_), Some(_)) => {
            return Err(bad("it needs either content or content_base64"));
        }
    };
    let mode = mode.unwrap_or_default();
    if !mode.is_empty() && u32::from_str_radix(&mode, 8).map_or(true, |bits| bits > 0o7777) {
        return Err(bad("its mode is not an octal number up to 7777"));
    }
    Ok(FileRequest { path, content, mode })
}
