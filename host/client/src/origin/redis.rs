//! Keys of Redis: those of type string, with their TTL.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use redis::{Client, Connection, FromRedisValue, Pipeline, RedisResult, TlsCertificates, cmd};

use super::{Lines, Login, Origin, PAGE, READ_TIMEOUT};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of values that are read at once, unless one is larger.
const PAGE_BYTES: u64 = 16 << 20;

pub fn copy(origin: &Origin, authorities: Option<&Path>, lines: &mut Lines) -> Result<()> {
    let mut redis = connect(origin, authorities)?;
    lines.expect(cmd("DBSIZE").query(&mut redis)?);
    let mut cursor = 0;
    loop {
        let (next, keys): (u64, Vec<Vec<u8>>) = cmd("SCAN").arg(cursor).arg("COUNT").arg(PAGE).query(&mut redis)?;
        copy_keys(&mut redis, &keys, lines)?;
        cursor = next;
        if cursor == 0 {
            return Ok(());
        }
    }
}

fn connect(origin: &Origin, authorities: Option<&Path>) -> Result<Connection> {
    let encoded = |part: &str| utf8_percent_encode(part, NON_ALPHANUMERIC).to_string();
    let login = origin.login.as_ref().map_or(String::new(), |Login { user, password }| {
        let password = password.as_ref().map_or(String::new(), |password| format!(":{}", encoded(password)));
        format!("{}{password}@", encoded(user))
    });
    let scheme = if origin.is_tls { "rediss" } else { "redis" };
    let url = format!("{scheme}://{login}{}/{}", origin.address, origin.database.unwrap_or(0));
    // The error of the library shows no part of the URL.
    let client = match authorities.filter(|_| origin.is_tls) {
        Some(file) => {
            let root_cert = fs::read(file).with_context(|| format!("cannot read --cacert {}", file.display()))?;
            Client::build_with_tls(url, TlsCertificates { client_tls: None, root_cert: Some(root_cert) })?
        }
        None => Client::open(url)?,
    };
    let connection = client.get_connection_with_timeout(CONNECT_TIMEOUT).context("cannot connect; check --from")?;
    connection.set_read_timeout(Some(READ_TIMEOUT))?;
    Ok(connection)
}

/// Copies the values of some keys.
fn copy_keys(redis: &mut Connection, keys: &[Vec<u8>], lines: &mut Lines) -> Result<()> {
    let types: Vec<RedisResult<String>> = ask(redis, "TYPE", keys)?;
    let (mut strings, mut others) = (Vec::new(), Vec::new());
    for (key, kind) in keys.iter().zip(types) {
        let kind = kind?;
        match kind.as_str() {
            "string" => strings.push(key),
            // It has gone meanwhile.
            "none" => {}
            _ => others.push((key, kind)),
        }
    }
    for (key, kind) in others {
        lines.leave_out(key, &format!("its type is {kind}; only strings are copied"));
    }
    let sizes: Vec<RedisResult<u64>> = ask(redis, "STRLEN", &strings)?;
    let mut rest = &strings[..];
    let mut sizes = &sizes[..];
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |size: &&RedisResult<u64>| {
            // GET has the same error.
            bytes += size.as_ref().map_or(0, |size| *size);
            bytes <= PAGE_BYTES
        };
        let count = sizes.iter().take_while(fits).count().max(1);
        let left: Vec<RedisResult<i64>> = ask(redis, "PTTL", &rest[..count])?;
        let values: Vec<RedisResult<Option<Vec<u8>>>> = ask(redis, "GET", &rest[..count])?;
        for ((key, value), left) in rest.iter().zip(values).zip(left) {
            match value {
                // Negative without a TTL.
                Ok(Some(value)) => lines.put(key, &value, u64::try_from(left?).ok().map(Duration::from_millis))?,
                // It has gone meanwhile.
                Ok(None) => {}
                Err(error) if error.code() == Some("WRONGTYPE") => {
                    lines.leave_out(key, "its type changed during the copy; only strings are copied");
                }
                Err(error) => return Err(error.into()),
            }
        }
        (rest, sizes) = (&rest[count..], &sizes[count..]);
    }
    Ok(())
}

/// The answers to a command for each key, in one round trip.
fn ask<T: FromRedisValue>(
    redis: &mut Connection,
    command: &str,
    keys: &[impl AsRef<[u8]>],
) -> RedisResult<Vec<RedisResult<T>>> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let mut pipeline = Pipeline::new();
    // The error of one key is not that of the others.
    pipeline.ignore_errors();
    for key in keys {
        pipeline.cmd(command).arg(key.as_ref());
    }
    pipeline.query(redis)
}
