//! Former names of flags, variables and commands: each is rejected with its new name.
//!
//! A unit file or script that still uses one must not start on a default instead, such as an empty transaction log.

/// Flags, without their dashes. The variable of each is its name in upper case, with `KVS_` before it.
const FLAGS: [(&str, &str); 17] = [
    ("access-log", "access-log-rate"),
    ("data", "data-dir"),
    ("drain", "drain-timeout"),
    ("guest-append-bytes", "guest-max-append-bytes"),
    ("guest-appends", "guest-max-appends"),
    ("guest-call-timeout", "guest-cpu-limit"),
    ("guest-instances", "guest-max-instances"),
    ("guest-memory-bytes", "guest-max-memory-bytes"),
    ("guest-table-elements", "guest-max-table-elements"),
    ("log", "txlog"),
    ("log-timeout", "txlog-timeout"),
    ("max-hold", "max-wait"),
    ("max-resets", "http2-max-resets"),
    ("max-streams", "http2-max-streams"),
    ("stream-heartbeat", "watch-keep-alive"),
    ("stream-lag-bytes", "watch-buffer-bytes"),
    ("watch", "watch-guest"),
];

/// Commands, with their parents.
const COMMANDS: [(&str, &str); 5] = [
    ("kvs dump", "kvs export"),
    ("kvs load", "kvs import"),
    ("kvs log", "kvs txlog"),
    ("kvs token new", "kvs token create"),
    ("kvs txlog dump", "kvs txlog cat"),
];

/// Returns the error for a former flag such as `--log`.
pub fn flag(name: &str) -> Option<String> {
    let new = new_flag(name.strip_prefix("--")?)?;
    Some(format!("{name} was renamed: use --{new}"))
}

/// Returns the error for a former variable such as `KVS_LOG`.
pub fn variable(name: &str) -> Option<String> {
    if name == "KVS_LOG" {
        return Some(
            "KVS_LOG was renamed: KVS_TXLOG is the storage of the transaction log, KVS_LOG_FILTER filters diagnostics"
                .to_owned(),
        );
    }
    let flag = name.strip_prefix("KVS_")?.to_lowercase().replace('_', "-");
    let new = new_flag(&flag)?.to_uppercase().replace('-', "_");
    Some(format!("{name} was renamed: use KVS_{new}"))
}

/// Returns the error for a former command such as `kvs log`.
pub fn command(name: &str) -> Option<String> {
    let (_, new) = COMMANDS.iter().find(|(old, _)| *old == name)?;
    Some(format!("`{name}` was renamed: use `{new}`"))
}

fn new_flag(old: &str) -> Option<&'static str> {
    FLAGS.iter().find(|(name, _)| *name == old).map(|(_, new)| *new)
}
