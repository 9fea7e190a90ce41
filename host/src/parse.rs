//! Parsers of flag values: addresses, times, counts, sizes, rates.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;
use hyper::Uri;
use kvs_runtime::Clock;
use kvs_txlog::backup::Until;

use crate::guest::MAX_SHADOW;
use crate::memory::MAX_INSTANCE_BYTES;

pub fn address(text: &str) -> Result<SocketAddr, String> {
    let mut addresses =
        text.to_socket_addrs().map_err(|error| format!("{error}; an address looks like 127.0.0.1:8080"))?;
    addresses.next().ok_or_else(|| "the name has no address".to_owned())
}

/// Parses the address of a listener that is opened after a takeover; its port must be fixed.
pub fn fixed_address(text: &str) -> Result<SocketAddr, String> {
    let address = address(text)?;
    if address.port() == 0 { Err("this listener needs a port other than 0".to_owned()) } else { Ok(address) }
}

/// Parses a URL that fits in a header and in a log line.
pub fn advertise(text: &str) -> Result<String, String> {
    let uri = text.parse::<Uri>().ok().filter(|_| text.len() <= 256);
    let is_http =
        uri.is_some_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some());
    if is_http {
        Ok(text.to_owned())
    } else {
        Err("must be a URL of at most 256 bytes, like https://kvs-1.example:8443".to_owned())
    }
}

/// Parses a duration. A number without a unit is in seconds, as in the HTTP API.
pub fn duration(text: &str) -> Result<Duration, String> {
    let duration = duration_or_zero(text)?;
    if duration.is_zero() { Err("must be greater than zero".to_owned()) } else { Ok(duration) }
}

/// Parses a duration that may be zero.
pub fn duration_or_zero(text: &str) -> Result<Duration, String> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = kvs_client::duration(&if is_number { format!("{text}s") } else { text.to_owned() });
    parsed.map_err(|error| format!("{error}; a time looks like 500ms, 5s or 2m"))
}

/// Parses the duration of shadow traffic.
pub fn shadow(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    let max = humantime::format_duration(MAX_SHADOW);
    if duration <= MAX_SHADOW { Ok(duration) } else { Err(format!("must be at most {max}")) }
}

/// Parses a percentage that is more than nothing.
pub fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse().ok();
    number
        .filter(|percent| (0.0..=100.0).contains(percent) && *percent > 0.0)
        .ok_or_else(|| "must be a percentage above 0 and up to 100, like 10%".to_owned())
}

/// The end of the year 9999: a later date has no text form.
const LATEST_EXPIRY: Duration = Duration::from_secs(253_402_300_799);

/// Parses the expiry of a token: a [`duration`] from now, or a date, with or without a time of day in UTC.
pub fn expiry(text: &str) -> Result<SystemTime, String> {
    let now = Clock::system().wall();
    let date = humantime::parse_rfc3339_weak(text).or_else(|_| humantime::parse_rfc3339(&format!("{text}T00:00:00Z")));
    match date.ok().or_else(|| now.checked_add(duration_or_zero(text).ok()?)) {
        Some(at) if at > UNIX_EPOCH + LATEST_EXPIRY => Err("is after the year 9999".to_owned()),
        Some(at) if at > now => Ok(at),
        Some(_) => Err("is in the past".to_owned()),
        None => Err("an expiry looks like 90days, 2027-01-31 or 2027-01-31T12:00:00Z".to_owned()),
    }
}

/// Parses a point in time: a sequence, a time as RFC 3339, or one in milliseconds since 1970.
pub fn until(text: &str) -> Result<Until, String> {
    if let Ok(sequence) = text.parse() {
        return Ok(Until::Sequence(sequence));
    }
    if let Some(Ok(time)) = text.strip_suffix("ms").map(str::parse) {
        return Ok(Until::Time(time));
    }
    let time = humantime::parse_rfc3339_weak(text).ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let time = time.and_then(|since| u64::try_from(since.as_millis()).ok());
    time.map(Until::Time).ok_or_else(|| {
        "must be a sequence, a time like 2026-05-31T12:00:00Z, or milliseconds since 1970 like 1780228800000ms"
            .to_owned()
    })
}

/// Parses a read lease: longer than a statement takes, and no longer than the timeout of a primary without one.
pub fn read_lease(text: &str) -> Result<Duration, String> {
    let lease = duration(text)?;
    let range = Duration::from_millis(100)..=Duration::from_secs(10);
    if range.contains(&lease) { Ok(lease) } else { Err("must be from 100ms to 10s".to_owned()) }
}

/// Parses the shortest time between two ticks: not longer than the usual one.
pub fn tick_interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    if interval <= Duration::from_secs(1) { Ok(interval) } else { Err("must be at most 1s".to_owned()) }
}

pub fn count(text: &str) -> Result<usize, String> {
    // Below the maximum of a semaphore, and far above the limits of the system.
    text.parse()
        .ok()
        .filter(|count| (1..=1 << 24).contains(count))
        .ok_or_else(|| "must be a count from 1 to 16777216".to_owned())
}

pub fn rate(text: &str) -> Result<(u32, Duration), String> {
    let (count, per) = text.split_once('/').ok_or("a rate looks like 1000/s or 600/m")?;
    let count = count.parse().ok().filter(|count| (1..=1_000_000).contains(count));
    let per = match per {
        "s" => Some(Duration::from_secs(1)),
        "m" => Some(Duration::from_secs(60)),
        _ => None,
    };
    count.zip(per).ok_or_else(|| "must be from 1 to 1000000 per second or minute, like 1000/s or 600/m".to_owned())
}

pub fn target_bytes(text: &str) -> Result<ByteSize, String> {
    // The maximum of hyper.
    size(text, 256, 65_534)
}

pub fn header_bytes(text: &str) -> Result<ByteSize, String> {
    size(text, 8 << 10, 16 << 20)
}

pub fn value_bytes(text: &str) -> Result<ByteSize, String> {
    size(text, 1, 1 << 30)
}

pub fn memory_bytes(text: &str) -> Result<ByteSize, String> {
    size(text, 1 << 20, MAX_INSTANCE_BYTES)
}

pub fn inflight_bytes(text: &str) -> Result<ByteSize, String> {
    size(text, 1 << 20, 1 << 50)
}

pub fn size(text: &str, least: u64, most: u64) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}; a size looks like 4096, 64KiB or 1MiB"))?;
    if (least..=most).contains(&size.as_u64()) {
        Ok(size)
    } else {
        Err(format!("must be a size from {} to {}", ByteSize(least), ByteSize(most)))
    }
}

pub fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a setting looks like KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_has_bounds_and_units() {
        assert_eq!(value_bytes("1MiB"), Ok(ByteSize(1 << 20)));
        assert_eq!(value_bytes("4096"), Ok(ByteSize(4096)));
        assert!(value_bytes("0").is_err());
        assert!(value_bytes("1TiB").is_err());
        assert!(value_bytes("lots").is_err());
    }

    #[test]
    fn advertised_url_has_scheme_and_host() {
        for fits in ["http://10.0.0.1:8080", "https://kvs.example", "http://[::1]:80/"] {
            assert_eq!(advertise(fits).as_deref(), Ok(fits));
        }
        let long = format!("http://{}", "a".repeat(250));
        for unfit in ["", "kvs.example:8080", "ftp://kvs.example", "http://", "http://a b", "http://a\r\nb: c", &long] {
            assert!(advertise(unfit).is_err(), "{unfit}");
        }
    }

    #[test]
    fn expiry_is_a_date_or_a_time_from_now() {
        let since =
            |text| expiry(text).map(|at| at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |at| at.as_secs()));
        assert_eq!(since("2227-01-31"), Ok(8_112_700_800));
        assert_eq!(since("2227-01-31T00:00:01Z"), Ok(8_112_700_801));
        let soon = since("90days").expect("it is one") - since("1day").expect("it is one");
        assert!(soon.abs_diff(89 * 86_400) < 60, "{soon}");
        let (number, with_unit) = (since("8640000").expect("it is one"), since("100days").expect("it is one"));
        assert!(number.abs_diff(with_unit) < 60, "{number} and {with_unit}");
        for wrong in ["", "soon", "2020-01-01", "0", "0s", "-1d", "9000years", "99999999999years"] {
            assert!(expiry(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn duration_without_unit_is_in_seconds() {
        for (text, milliseconds) in [("90", 90_000), ("90s", 90_000), ("500ms", 500), ("1h 1s", 3_601_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for wrong in ["", "0", "0s", "1.5", "-1", "soon", "99999999999999999999"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert_eq!(duration_or_zero("0"), Ok(Duration::ZERO));
        assert_eq!(duration_or_zero("90"), Ok(Duration::from_secs(90)));
    }
}
