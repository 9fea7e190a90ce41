//! Logs in files, written without a server.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvs_runtime::Env;
use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Options};
use kvs_txlog::{Event, Put, TransactionLog};

pub const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// In milliseconds since 1970, a year from now.
pub fn next_year() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970") + YEAR;
    u64::try_from(time.as_millis()).expect("it is a time")
}

/// Opens a log, to append to it as a server does.
pub fn open_log(data: &Path) -> FileLog {
    let (data, segment_bytes, env) = (data.into(), DEFAULT_SEGMENT_BYTES, Env::real());
    let (group_bytes, durability, advertise) = (1 << 20, Durability::Sync, None);
    let options = Options { data, segment_bytes, group_bytes, durability, retain: Duration::ZERO, advertise, env };
    FileLog::open(options).expect("it can be opened")
}

/// Writes a log like a server whose clock is a year ahead: a key that expires a second later, and one without expiry.
pub fn write_a_year_ahead(data: &Path) {
    let time = next_year();
    let log = open_log(data);
    for (key, expires) in [("before", Some(time + 1_000)), ("stays", None)] {
        let put = Put { key: key.into(), value: b"value".to_vec(), metadata: Vec::new(), expires };
        log.append(time, &[Event::Put(put)]).expect("it takes it");
    }
    log.close().expect("it can be closed");
}
