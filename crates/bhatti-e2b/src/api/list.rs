//! Listing sandboxes.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bhatti_store::{SandboxFilter, SandboxRow};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::Value;

use super::{Id, MayControl, Owner, Query, find, no_sandbox, objects};
use crate::settings::Settings;
use crate::{E2b, Error};

/// The default length of a page, and its maximum.
pub(super) const PAGE_MAX: usize = 100;

/// The header with the token of the next page.
const NEXT: &str = "x-next-token";

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Wanted {
    metadata: String,
    state: String,
    template: String,
    started_after: String,
    order: String,
    limit: Option<usize>,
    next_token: String,
}

/// `GET /v2/sandboxes`.
pub(super) async fn list(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Query(query): Query<Wanted>,
) -> Result<Response, Error> {
    let filter = Filter::of(&query)?;
    let rows = e2b.0.control.list(owner, &SandboxFilter::default());
    let mut rows = rows.map_err(|error| e2b.0.describe.store(error))?;
    rows.sort_by_key(place_of);
    let is_ascending = query.order == "asc";
    if !is_ascending {
        rows.reverse();
    }
    let listed = |row: &SandboxRow| {
        let settings = Settings::of(row);
        let shown = objects::listed(row, &settings).filter(|_| filter.admits(row, &settings))?;
        Some((place_of(row), shown))
    };
    let all: Vec<_> = rows.iter().filter_map(listed).collect();
    let (shown, next) = page(all, is_ascending, &query.next_token, query.limit)?;
    Ok(paged(shown, next))
}

/// Where a sandbox is in the list: its start and its id.
fn place_of(row: &SandboxRow) -> String {
    format!("{} {}", row.created_at, row.id)
}

/// Returns the page after `token`, and the token of the next one. The entries come with their
/// places, in the order of these.
pub(super) fn page(
    all: Vec<(String, Value)>,
    is_ascending: bool,
    token: &str,
    limit: Option<usize>,
) -> Result<(Vec<Value>, Option<String>), Error> {
    let limit = limit.unwrap_or(PAGE_MAX);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Error::bad_request(format!("invalid limit {limit}: 1 to {PAGE_MAX}")));
    }
    let mut all = all;
    if !token.is_empty() {
        let invalid = || Error::bad_request(format!("invalid next token {token:?}"));
        let last = URL_SAFE_NO_PAD.decode(token).map_err(|_| invalid())?;
        let last = String::from_utf8(last).map_err(|_| invalid())?;
        // The last entry may be gone meanwhile.
        all.retain(|(place, _)| if is_ascending { *place > last } else { *place < last });
    }
    let mut rest = all.into_iter().peekable();
    let mut shown = Vec::new();
    let mut last = String::new();
    while shown.len() < limit {
        let Some((place, entry)) = rest.next() else { break };
        last = place;
        shown.push(entry);
    }
    let next = rest.peek().map(|_| URL_SAFE_NO_PAD.encode(last));
    Ok((shown, next))
}

/// Answers with a page.
pub(super) fn paged(shown: Vec<Value>, next: Option<String>) -> Response {
    let mut response = axum::Json(shown).into_response();
    if let Some(next) = next.and_then(|next| next.parse().ok()) {
        response.headers_mut().insert(NEXT, next);
    }
    response
}

/// Selects sandboxes.
struct Filter {
    metadata: BTreeMap<String, String>,
    states: Vec<String>,
    template: Option<String>,
    started_after: Option<Timestamp>,
}

impl Filter {
    fn of(query: &Wanted) -> Result<Self, Error> {
        let states: Vec<_> =
            query.state.split(',').filter(|state| !state.is_empty()).map(str::to_owned).collect();
        if let Some(other) = states.iter().find(|state| !["running", "paused"].contains(&&***state))
        {
            return Err(Error::bad_request(format!("invalid state {other:?}: running or paused")));
        }
        let after = (!query.started_after.is_empty()).then(|| query.started_after.parse());
        let started_after = after.transpose().map_err(|_| {
            Error::bad_request(format!("invalid startedAfter {:?}", query.started_after))
        })?;
        let template = (!query.template.is_empty()).then(|| query.template.clone());
        Ok(Self { metadata: metadata(&query.metadata)?, states, template, started_after })
    }

    fn admits(&self, row: &SandboxRow, settings: &Settings) -> bool {
        let state = objects::state(row).unwrap_or_default();
        let started = || row.created_at.parse::<Timestamp>().ok();
        (self.states.is_empty() || self.states.iter().any(|wanted| wanted == state))
            && self.template.as_ref().is_none_or(|wanted| *wanted == settings.template)
            && self.started_after.is_none_or(|after| started().is_some_and(|at| at >= after))
            && self.metadata.iter().all(|(key, value)| settings.metadata.get(key) == Some(value))
    }
}

/// Reads the metadata of a query. Names and values were encoded before they were encoded as a list.
fn metadata(text: &str) -> Result<BTreeMap<String, String>, Error> {
    let pairs: Vec<(String, String)> = serde_html_form::from_str(text)
        .map_err(|_| Error::bad_request(format!("invalid metadata {text:?}")))?;
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    Ok(pairs.iter().map(|(key, value)| (decode(key), decode(value))).collect())
}

/// `GET /sandboxes/{id}`.
pub(super) async fn get(
    State(e2b): State<E2b>,
    owner: Owner,
    MayControl(may_control): MayControl,
    Id(id): Id,
) -> Result<Response, Error> {
    let row = find(&e2b, owner, &id)?;
    let detail = objects::detail(&e2b, &row, &Settings::of(&row), may_control);
    detail.map(|detail| axum::Json(detail).into_response()).ok_or_else(|| no_sandbox(&id))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pages_have_every_entry_once() {
        let all: Vec<_> = (0..25).map(|n| (format!("{n:02}"), json!(n))).collect();
        let (mut token, mut seen) = (String::new(), Vec::new());
        loop {
            let (shown, next) = page(all.clone(), true, &token, Some(10)).unwrap();
            seen.extend(shown);
            match next {
                Some(next) => token = next,
                None => break,
            }
        }
        assert_eq!(seen, (0..25).map(|n| json!(n)).collect::<Vec<_>>());
        assert!(
            page(all.clone(), true, "!", None).is_err() && page(all, true, "", Some(101)).is_err()
        );
    }

    #[test]
    fn metadata_is_decoded_twice() {
        let expected = BTreeMap::from([("a b".to_owned(), "x&y=z".to_owned())]);
        assert_eq!(metadata("a%2520b=x%2526y%253Dz").unwrap(), expected);
    }
}
