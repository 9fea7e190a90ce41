//! The types of the contract that the log speaks in. In the host they are generated from `wit/`, by wasmtime.

#[derive(Debug)]
pub struct Put {
    pub key: String,
    pub value: Vec<u8>,
    pub metadata: Vec<(String, String)>,
    pub expires: Option<u64>,
}

#[derive(Debug)]
pub enum Event {
    Put(Put),
    Delete(String),
}

#[derive(Clone, Copy)]
pub struct PutRef<'a> {
    pub key: &'a str,
    pub value: &'a [u8],
    pub metadata: &'a [(&'a str, &'a str)],
    pub expires: Option<u64>,
}

#[derive(Clone, Copy)]
pub enum EventRef<'a> {
    Put(PutRef<'a>),
    Delete(&'a str),
}

pub struct Entry<'a> {
    pub sequence: u64,
    pub time: u64,
    pub event: EventRef<'a>,
}
