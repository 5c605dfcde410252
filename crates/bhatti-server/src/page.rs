//! Pages of a list. All lists take the same parameters and lead to their next page in the same
//! way.

use axum::extract::FromRequestParts;
use axum::http::HeaderValue;
use axum::http::header::LINK;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::extract::{ApiQuery, number};
use crate::json::Json;
use crate::status::ApiError;
use crate::{VERSION, Versioned};

/// Maximum number of elements on a page.
const LIMIT_MAX: u32 = 1000;

/// Separates the parts of a cursor. It sorts after all characters of times, ids and names.
const SEPARATOR: char = '~';

/// Selects a page of a list.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PageQuery {
    /// Maximum number of elements to return, 1 to 1000 (default: all). If there are more, the
    /// response has a `Link` header with `rel="next"`.
    #[param(minimum = 1, maximum = 1000)]
    #[serde(default, deserialize_with = "number")]
    limit: Option<u32>,
    /// Cursor to continue after, from a `Link` header.
    after: Option<String>,
}

/// The wanted page of a list, and the list's path.
pub(crate) struct Paging {
    query: PageQuery,
    path: String,
}

impl<S: Send + Sync> FromRequestParts<S> for Paging {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let ApiQuery(mut query) = ApiQuery::<PageQuery>::from_request_parts(parts, state).await?;
        check_limit(query.limit)?;
        query.after = query.after.filter(|after| !after.is_empty());
        let ListPath(path) = ListPath::from_request_parts(parts, state).await?;
        Ok(Self { query, path })
    }
}

/// The path of a list, as the client has sent it.
pub(crate) struct ListPath(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for ListPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let version = parts.extensions.get::<Versioned>().map_or("", |Versioned| VERSION);
        Ok(Self(format!("{version}{}", parts.uri.path())))
    }
}

/// Checks the number of elements that a page may have.
pub(crate) fn check_limit(limit: Option<u32>) -> Result<(), ApiError> {
    match limit {
        Some(limit) if !(1..=LIMIT_MAX).contains(&limit) => {
            let message = format!("invalid limit {limit}: expected 1 to {LIMIT_MAX}");
            Err(ApiError::new(ErrorCode::BadRequest, message))
        }
        _ => Ok(()),
    }
}

/// Returns the error for a cursor that did not come from a `Link` header.
pub(crate) fn bad_cursor(cursor: &str) -> ApiError {
    ApiError::new(ErrorCode::WrongState, format!("the list has no place `{cursor}`"))
        .hint("take the cursor from a Link header, or start again without one")
}

/// Returns the cursor of an element that a list has at its place for a time and an id.
pub(crate) fn cursor(created_at: &str, id: impl std::fmt::Display) -> String {
    format!("{created_at}{SEPARATOR}{id}")
}

/// Splits the result of [`cursor`].
pub(crate) fn split_cursor(cursor: &str) -> Result<(&str, &str), ApiError> {
    cursor.split_once(SEPARATOR).ok_or_else(|| bad_cursor(cursor))
}

impl Paging {
    /// Returns the page of a list that is in ascending order of `key`. No two keys are equal.
    pub(crate) fn by_key<T>(self, all: Vec<T>, key: impl Fn(&T) -> String) -> Page<T> {
        let is_after = |element: &T, after: &str| key(element).as_str() > after;
        self.cut(all, is_after, &key)
    }

    /// Returns the page of a list with the newest element first. `place` returns the time of an
    /// element, and its id, by which elements of the same time are in ascending order.
    pub(crate) fn newest_first<T>(
        self,
        all: Vec<T>,
        place: impl Fn(&T) -> (String, String),
    ) -> Result<Page<T>, ApiError> {
        if let Some(after) = &self.query.after {
            split_cursor(after)?;
        }
        let is_after = |element: &T, after: &str| {
            let (at, id) = place(element);
            let (after_at, after_id) = split_cursor(after).unwrap_or_default();
            (after_at, id.as_str()) > (at.as_str(), after_id)
        };
        Ok(self.cut(all, is_after, |element| {
            let (at, id) = place(element);
            cursor(&at, id)
        }))
    }

    /// Returns the page of a list in any order. The element of the cursor must still exist.
    pub(crate) fn in_order<T>(
        mut self,
        mut all: Vec<T>,
        id: impl Fn(&T) -> &str,
    ) -> Result<Page<T>, ApiError> {
        if let Some(after) = self.query.after.take() {
            let at = all.iter().position(|element| id(element) == after);
            all.drain(..=at.ok_or_else(|| bad_cursor(&after))?);
        }
        Ok(self.cut(all, |_, _| true, |element| id(element).to_owned()))
    }

    fn cut<T>(
        self,
        mut elements: Vec<T>,
        is_after: impl Fn(&T, &str) -> bool,
        cursor: impl Fn(&T) -> String,
    ) -> Page<T> {
        let Self { query: PageQuery { limit, after }, path } = self;
        if let Some(after) = after {
            elements.retain(|element| is_after(element, &after));
        }
        let next = limit.filter(|limit| elements.len() > *limit as usize).and_then(|limit| {
            elements.truncate(limit as usize);
            let last = cursor(elements.last()?);
            next_link(&path, &[("limit", &limit.to_string()), ("after", &last)])
        });
        Page { elements, next }
    }
}

/// Returns the value of the `Link` header that leads to the next page.
pub(crate) fn next_link(path: &str, query: &[(&str, &str)]) -> Option<HeaderValue> {
    let query = serde_html_form::to_string(query).ok()?;
    HeaderValue::try_from(format!("<{path}?{query}>; rel=\"next\"")).ok()
}

/// A page of a list: a JSON array, with a `Link` header if there is a next page.
pub(crate) struct Page<T> {
    elements: Vec<T>,
    next: Option<HeaderValue>,
}

impl<T> Page<T> {
    /// Converts each element.
    pub(crate) fn map<U>(self, convert: impl FnMut(T) -> U) -> Page<U> {
        Page { elements: self.elements.into_iter().map(convert).collect(), next: self.next }
    }
}

impl<T: Serialize> IntoResponse for Page<T> {
    fn into_response(self) -> Response {
        with_link(Json(self.elements), self.next)
    }
}

/// Adds the header of a page that is not the last one.
pub(crate) fn with_link(page: impl IntoResponse, next: Option<HeaderValue>) -> Response {
    let mut response = page.into_response();
    if let Some(link) = next {
        response.headers_mut().insert(LINK, link);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paging(limit: Option<u32>, after: Option<&str>) -> Paging {
        let query = PageQuery { limit, after: after.map(str::to_owned) };
        Paging { query, path: "/list".to_owned() }
    }

    fn seen<T: Copy>(page: &Page<T>) -> (Vec<T>, Option<&str>) {
        (page.elements.clone(), page.next.as_ref().map(|link| link.to_str().unwrap()))
    }

    #[test]
    fn pages_follow_each_other_to_the_end_of_the_list() {
        let page = |limit, after| {
            paging(limit, after).by_key(vec!["a", "b &", "c"], |name| (*name).to_owned())
        };
        let link = |after: &str| format!("</list?limit=1&after={after}>; rel=\"next\"");
        assert_eq!(seen(&page(None, None)), (vec!["a", "b &", "c"], None));
        assert_eq!(seen(&page(Some(1), None)), (vec!["a"], Some(&*link("a"))));
        assert_eq!(seen(&page(Some(1), Some("a"))), (vec!["b &"], Some(&*link("b+%26"))));
        assert_eq!(seen(&page(Some(1), Some("b &"))), (vec!["c"], None));
        assert_eq!(seen(&page(Some(3), None)), (vec!["a", "b &", "c"], None));
        // The element of the cursor may have been deleted.
        assert_eq!(seen(&page(None, Some("aa"))), (vec!["b &", "c"], None));
        assert_eq!(seen(&page(None, Some("c"))), (vec![], None));
    }

    #[test]
    fn newest_elements_come_first_and_those_of_one_time_by_id() {
        let all = vec![("3", "a"), ("2", "b"), ("2", "d"), ("1", "c")];
        let page = |after| {
            let place = |(at, id): &(&str, &str)| ((*at).to_owned(), (*id).to_owned());
            paging(Some(4), after).newest_first(all.clone(), place).map(|page| page.elements)
        };
        assert_eq!(page(None).unwrap(), all);
        assert_eq!(page(Some("2~b")).unwrap(), all[2..]);
        assert_eq!(page(Some("2~c")).unwrap(), all[2..]);
        assert_eq!(page(Some("2~d")).unwrap(), all[3..]);
        assert_eq!(page(Some("1~c")).unwrap(), []);
        assert!(page(Some("nonsense")).is_err());
    }

    #[test]
    fn list_in_any_order_continues_after_its_element() {
        let page = |after| paging(Some(1), after).in_order(vec!["b", "a", "c"], |id| id);
        let link = |after: &str| format!("</list?limit=1&after={after}>; rel=\"next\"");
        assert_eq!(seen(&page(Some("b")).unwrap()), (vec!["a"], Some(&*link("a"))));
        assert_eq!(seen(&page(Some("a")).unwrap()), (vec!["c"], None));
        assert!(page(Some("x")).is_err());
    }
}
