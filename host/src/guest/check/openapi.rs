//! The operations of an OpenAPI document that a guest serves.

use hyper::Method;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

/// Path of the document.
pub const PATH: &str = "/openapi.json";

/// An operation: what a request for it is made of.
#[derive(Clone, Debug)]
pub struct Operation {
    pub method: Method,
    /// With the names of parameters in braces.
    pub path: String,
    /// Parameters of the query: for each its name, and the values that the document has for it.
    pub query: Vec<(String, Vec<String>)>,
    pub has_body: bool,
}

/// The operations of a document; none where it is none.
pub fn operations(document: &[u8]) -> Vec<Operation> {
    let document: Value = serde_json::from_slice(document).unwrap_or_default();
    let paths = document["paths"].as_object().into_iter().flatten();
    let each = paths
        .flat_map(|(path, item)| item.as_object().into_iter().flatten().map(move |operation| (path, item, operation)));
    let operations = each.filter_map(|(path, item, (method, operation))| {
        // A path has other fields too, none of which is the object of an operation.
        operation["responses"].as_object()?;
        let method = Method::from_bytes(method.to_uppercase().as_bytes()).ok()?;
        let parameters = [item, operation].into_iter().filter_map(|of| of["parameters"].as_array()).flatten();
        let query = parameters.filter_map(|parameter| query(resolved(&document, parameter)));
        let (query, has_body) = (query.collect(), operation["requestBody"].is_object());
        Some(Operation { method, path: path.clone(), query, has_body })
    });
    operations.collect()
}

fn query(parameter: &Value) -> Option<(String, Vec<String>)> {
    let name = parameter["name"].as_str().filter(|_| parameter["in"] == "query")?;
    let schema = &parameter["schema"];
    let examples = parameter["examples"].as_object().into_iter().flatten().map(|(_, example)| &example["value"]);
    let listed = [&schema["enum"], &schema["examples"]].into_iter().filter_map(Value::as_array).flatten();
    let values =
        [&parameter["example"], &schema["const"], &schema["default"]].into_iter().chain(examples).chain(listed);
    let text = |value: &Value| match value {
        Value::String(text) => Some(utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    };
    Some((name.to_owned(), values.filter_map(text).collect()))
}

/// What a reference refers to.
fn resolved<'d>(document: &'d Value, value: &'d Value) -> &'d Value {
    let reference = value["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
    reference.and_then(|pointer| document.pointer(pointer)).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_of_the_built_in_store_are_found() {
        let operations = operations(include_bytes!("../../../../guest/kvs/openapi.json"));
        let has = |method: Method, path: &str| {
            operations.iter().find(|operation| operation.method == method && operation.path == path)
        };
        let put = has(Method::PUT, "/v1/{key}").expect("keys are put");
        assert!(put.has_body && put.query.iter().any(|(name, _)| name == "ttl"), "{put:?}");
        assert!(has(Method::GET, "/v1").is_some_and(|list| !list.has_body && list.query.len() > 5));
        assert!(has(Method::GET, "/openapi.json").is_some());
    }

    #[test]
    fn what_is_no_document_has_no_operations() {
        for text in ["", "null", "{\"paths\": 1}", "{\"paths\": {\"/a\": {\"get\": 1, \"put\": {}}}}"] {
            assert!(operations(text.as_bytes()).is_empty(), "{text}");
        }
    }
}
