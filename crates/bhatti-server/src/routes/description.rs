//! Completes the OpenAPI description with what the handlers' attributes do not say.

mod numbers;

use std::collections::BTreeSet;

use utoipa::openapi::request_body::RequestBody;
use utoipa::openapi::schema::{AdditionalProperties, Type};
use utoipa::openapi::{Content, Object, ObjectBuilder, OpenApi, RefOr, Required, Response, Schema};

/// The rules of a label's key and value.
const LABEL_KEY: &str = "^([a-zA-Z0-9._-]{1,63}/)?[a-zA-Z0-9._-]{1,63}$";
const LABEL_VALUE: &str = "^[a-zA-Z0-9._-]{0,256}$";

pub(super) fn complete(api: &mut OpenApi) {
    let mut optional = BTreeSet::new();
    for (name, schema) in api.components.iter_mut().flat_map(|all| &mut all.schemas) {
        numbers::complete(schema);
        if let RefOr::T(Schema::Object(object)) = schema {
            describe_labels(object);
            if object.required.is_empty() {
                optional.insert(format!("#/components/schemas/{name}"));
            }
        }
    }
    describe_operations(api, &optional);
}

/// Describes which labels a request may set.
fn describe_labels(request: &mut Object) {
    let Some(RefOr::T(Schema::Object(labels))) = request.properties.get_mut("labels") else {
        return;
    };
    let key = ObjectBuilder::new().schema_type(Type::String).pattern(Some(LABEL_KEY)).build();
    labels.property_names = Some(Box::new(Schema::Object(key)));
    if let Some(AdditionalProperties::RefOr(RefOr::T(Schema::Object(value)))) =
        labels.additional_properties.as_deref_mut()
    {
        value.pattern = Some(LABEL_VALUE.to_owned());
    }
}

/// Removes the schemas of bodies that are bytes. They were derived as arrays of numbers.
fn describe_bytes<'a>(contents: impl Iterator<Item = (&'a String, &'a mut RefOr<Content>)>) {
    for (media_type, content) in contents {
        let is_bytes =
            matches!(media_type.as_str(), "application/octet-stream" | "application/x-tar");
        if is_bytes && let RefOr::T(content) = content {
            content.schema = None;
        }
    }
}

/// Allows a request without a body, which counts as `{}`, if the body needs no field.
fn describe_request(body: &mut RequestBody, optional: &BTreeSet<String>) {
    describe_bytes(body.content.iter_mut());
    let json = body.content.get("application/json");
    let schema = json.and_then(|content| match content {
        RefOr::T(content) => content.schema.as_ref(),
        RefOr::Ref(_) => None,
    });
    if let Some(RefOr::Ref(schema)) = schema
        && optional.contains(&schema.ref_location)
    {
        body.required = Some(Required::False);
    }
}

/// Gives each operation a unique id, from its tag and its handler: `sandboxes_list`. Generators
/// name functions by it. Describes the responses.
fn describe_operations(api: &mut OpenApi, optional: &BTreeSet<String>) {
    for path in api.paths.paths.values_mut() {
        let operations = [
            &mut path.get,
            &mut path.put,
            &mut path.post,
            &mut path.delete,
            &mut path.patch,
            &mut path.head,
            &mut path.options,
            &mut path.trace,
        ];
        let operations: Vec<_> = operations.into_iter().flatten().collect();
        // A route for all methods has one handler.
        let is_shared = operations.len() > 1
            && operations.iter().all(|one| one.operation_id == operations[0].operation_id);
        for (number, operation) in operations.into_iter().enumerate() {
            let tag = operation.tags.iter().flatten().next().map_or("api", String::as_str);
            let handler = operation.operation_id.as_deref().unwrap_or("call");
            let number = if is_shared { format!("_{number}") } else { String::new() };
            operation.operation_id = Some(format!("{tag}_{handler}{number}"));
            numbers::complete_operation(operation);
            if let Some(RefOr::T(body)) = &mut operation.request_body {
                describe_request(body, optional);
            }
            for (status, response) in &mut operation.responses.responses {
                if let RefOr::T(response) = response {
                    describe_response(response, status == "default");
                }
            }
        }
    }
}

/// Gives a response a description, and an error the media type that errors have.
fn describe_response(response: &mut Response, is_error: bool) {
    describe_bytes(response.content.iter_mut());
    if response.description.is_empty() {
        let description = if is_error { "The request failed." } else { "Done." };
        response.description = description.to_owned();
    }
    if is_error && let Some(content) = response.content.shift_remove("application/json") {
        response.content.insert("application/problem+json".to_owned(), content);
    }
}
