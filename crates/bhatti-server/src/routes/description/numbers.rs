//! States the range of each integer, and names its format as the OpenAPI format registry does.
//!
//! utoipa derives formats such as `u-int32`, which generators of clients do not know, and no
//! maximum: a number that is too large would be valid, and the daemon refuses it.

use utoipa::Number;
use utoipa::openapi::path::Operation;
use utoipa::openapi::schema::{AdditionalProperties, ArrayItems, KnownFormat, SchemaFormat};
use utoipa::openapi::{Object, RefOr, Response, Schema};

/// Completes the integers in an operation's parameters and its responses' headers.
pub(super) fn complete_operation(operation: &mut Operation) {
    for parameter in operation.parameters.iter_mut().flatten() {
        if let RefOr::T(parameter) = parameter {
            parameter.schema.iter_mut().for_each(complete);
        }
    }
    for response in operation.responses.responses.values_mut() {
        let RefOr::T(Response { headers, .. }) = response else { continue };
        for header in headers.values_mut() {
            if let RefOr::T(header) = header {
                header.schema.iter_mut().for_each(complete);
            }
        }
    }
}

/// Completes the integers of a schema and of all schemas in it.
pub(super) fn complete(schema: &mut RefOr<Schema>) {
    let RefOr::T(schema) = schema else { return };
    match schema {
        Schema::Object(object) => {
            complete_integer(object);
            object.properties.values_mut().for_each(complete);
            if let Some(AdditionalProperties::RefOr(value)) =
                object.additional_properties.as_deref_mut()
            {
                complete(value);
            }
        }
        Schema::Array(array) => {
            if let ArrayItems::RefOrSchema(items) = &mut array.items {
                complete(items);
            }
        }
        Schema::OneOf(parts) => parts.items.iter_mut().for_each(complete),
        Schema::AllOf(parts) => parts.items.iter_mut().for_each(complete),
        Schema::AnyOf(parts) => parts.items.iter_mut().for_each(complete),
        _ => {}
    }
}

fn complete_integer(object: &mut Object) {
    let Some(SchemaFormat::KnownFormat(format)) = &object.format else { return };
    let (name, minimum, maximum) = match format {
        KnownFormat::UInt8 => ("uint8", 0, u8::MAX.into()),
        KnownFormat::UInt16 => ("uint16", 0, u16::MAX.into()),
        KnownFormat::UInt32 => ("uint32", 0, u32::MAX as usize),
        KnownFormat::UInt64 => ("uint64", 0, usize::MAX),
        KnownFormat::Int32 => ("int32", i32::MIN as isize, i32::MAX as usize),
        KnownFormat::Int64 => ("int64", isize::MIN, isize::MAX as usize),
        _ => return,
    };
    object.format = Some(SchemaFormat::Custom(name.to_owned()));
    object.minimum.get_or_insert(Number::Int(minimum));
    object.maximum.get_or_insert(Number::UInt(maximum));
}
