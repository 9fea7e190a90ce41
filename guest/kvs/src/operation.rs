//! The operations of a transaction as they are sent, in JSON.
//!
//! Owns: what each may say, and the place of what is wrong. Must never know: what is in the store, or what becomes of them.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::content_type;
use crate::key;
use crate::kvs::store::transaction_log::Put;
use crate::text;
use crate::value::MAX_TTL;

const MAX_OPERATIONS: usize = 1_000;
const MAX_BYTES: usize = 1 << 20;
/// Characters of a parser's message that are worth repeating.
const ECHOED_CHARACTERS: usize = 300;

/// An operation as it is sent.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sent {
    op: Op,
    key: String,
    #[serde(default, deserialize_with = "said")]
    value: Option<String>,
    #[serde(default, deserialize_with = "said")]
    value_base64: Option<String>,
    #[serde(default, deserialize_with = "said")]
    content_type: Option<String>,
    #[serde(default, deserialize_with = "said")]
    ttl: Option<u64>,
    /// `null` is no such key.
    #[serde(default, deserialize_with = "said")]
    etag: Option<Option<String>>,
}

#[derive(Clone, Copy, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    Check,
    Put,
    Delete,
    Get,
}

/// What is to be done.
pub enum Operation {
    Check(Expected),
    Put(Put),
    Delete,
    Get,
}

/// What a check wants to find.
pub enum Expected {
    Nothing,
    Something,
    Tag(String),
}

/// Why a transaction is refused: the status, and one line.
pub type Refused = (u16, String);

/// All of a body, each with its key.
pub fn operations(body: &[u8], now: u64) -> Result<Vec<(String, Operation)>, Refused> {
    if body.len() > MAX_BYTES {
        let length = body.len();
        return Err((413, format!("the transaction is {length} bytes, at most {MAX_BYTES} are allowed")));
    }
    let Transaction(sents) = serde_json::from_slice(body).map_err(|error| (400, printable(&error)))?;
    let operation =
        |(at, sent): (usize, Sent)| operation(sent, now).map_err(|reason| (400, format!("operation {at}: {reason}")));
    sents.into_iter().enumerate().map(operation).collect()
}

/// Checks what JSON cannot say.
fn operation(sent: Sent, now: u64) -> Result<(String, Operation), String> {
    let Sent { op, key, value, value_base64, content_type, ttl, etag } = sent;
    key::check(&key).map_err(|no_key| no_key.to_string())?;
    let given = [
        ("value", value.is_some(), op == Op::Put),
        ("value_base64", value_base64.is_some(), op == Op::Put),
        ("content_type", content_type.is_some(), op == Op::Put),
        ("ttl", ttl.is_some(), op == Op::Put),
        ("etag", etag.is_some(), op == Op::Check),
    ];
    if let Some((name, ..)) = given.into_iter().find(|(_, is_there, belongs)| *is_there && !belongs) {
        return Err(format!("`{name}` does not belong to it"));
    }
    let operation = match op {
        Op::Check => Operation::Check(match etag.ok_or("`etag` is missing")? {
            None => Expected::Nothing,
            Some(any) if any == "*" => Expected::Something,
            Some(tag) if is_tag(&tag) => Expected::Tag(tag),
            Some(_) => return Err(r#"`etag` must be null, "*", or an entity tag like "\"5\"""#.to_owned()),
        }),
        Op::Put => {
            let value = text::value(value, value_base64)?;
            let content_type = content_type.map(content_type::fit).transpose().map_err(|unfit| unfit.to_string())?;
            let metadata = content_type.flatten().map(|value| (content_type::NAME.to_owned(), value));
            if ttl.is_some_and(|ttl| !(1..=MAX_TTL).contains(&ttl)) {
                return Err(format!("`ttl` must be a whole number from 1 to {MAX_TTL}"));
            }
            let expires = ttl.map(|ttl| now.saturating_add(ttl * 1_000));
            Operation::Put(Put {
                key: key.clone(),
                value,
                metadata: metadata.into_iter().collect(),
                expires_at_ms: expires,
            })
        }
        Op::Delete => Operation::Delete,
        Op::Get => Operation::Get,
    };
    Ok((key, operation))
}

fn is_tag(text: &str) -> bool {
    let opaque = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    opaque.is_some_and(|opaque| !opaque.contains('"'))
}

/// A field that is there. `null` is a value of its own, and only good where it means something.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(field: D) -> Result<Option<T>, D::Error> {
    T::deserialize(field).map(Some)
}

/// All operations of a transaction, in order. An error names the one it is in.
#[derive(Default)]
struct Transaction(Vec<Sent>);

impl<'de> Deserialize<'de> for Transaction {
    fn deserialize<D: Deserializer<'de>>(body: D) -> Result<Self, D::Error> {
        body.deserialize_seq(Self::default())
    }
}

impl<'de> Visitor<'de> for Transaction {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of operations")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Self, A::Error> {
        loop {
            let at = self.0.len();
            match list.next_element() {
                Ok(None) => return Ok(self),
                Ok(Some(_)) if at == MAX_OPERATIONS => {
                    return Err(A::Error::custom(format!("at most {MAX_OPERATIONS} operations are allowed")));
                }
                Ok(Some(Object(sent))) => self.0.push(sent),
                Err(error) => return Err(A::Error::custom(format!("operation {at}: {error}"))),
            }
        }
    }
}

/// An operation that is an object. Without this, a list of all values of its fields would do too.
struct Object(Sent);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(operation: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an operation")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object, A::Error> {
                Sent::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }
        operation.deserialize_map(Fields)
    }
}

/// What a parser says, which repeats what was sent, as a line.
fn printable(error: &serde_json::Error) -> String {
    error.to_string().chars().filter(|character| !character.is_control()).take(ECHOED_CHARACTERS).collect()
}
