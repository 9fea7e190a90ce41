//! The token file: one token per line, `NAME SCOPE SHA256 [/PATH-PREFIX|key-prefix=PREFIX [max-keys=N] [max-bytes=N]] [expires=TIME]`.
//!
//! The token itself is not stored; it is 256 random bits, so its hash reveals nothing. Several tokens can have one name: a new
//! one is created before the old one is revoked.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use humantime::{format_rfc3339_seconds, parse_rfc3339};
use kvs_client::Output;
use kvs_runtime::Random;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use serde_json::json;

use super::{Hash, Prefix, Scope, TOKEN_PREFIX, Token, hash};
use crate::guest::Quota;

/// Beginning of the word with the expiry in a line.
const EXPIRES: &str = "expires=";
/// Beginning of the word with the key prefix in a line.
const KEY_PREFIX: &str = "key-prefix=";
/// Beginnings of the words with a quota in a line.
const MAX_KEYS: &str = "max-keys=";
const MAX_BYTES: &str = "max-bytes=";
/// Characters of a key prefix that are percent-encoded, so that it is one word.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%');
/// Maximum length of a key prefix, that of a key.
const MAX_PREFIX_BYTES: usize = 1_024;
/// Number of digits of a hash by which a token is listed and revoked.
const ID_DIGITS: usize = 12;

/// Limits of a token beside its scope.
pub struct Limits {
    pub prefix: Option<Prefix>,
    pub quota: Option<Quota>,
    pub expires: Option<SystemTime>,
}

/// Parses a file. Errors do not show a line, which may contain the token itself by mistake.
pub fn parse(text: &str) -> Result<Vec<(Hash, Token)>> {
    let mut known = HashSet::new();
    let parse = |(number, line)| {
        let (hash, token) = parse_line(line).with_context(|| format!("line {number}"))?;
        ensure!(known.insert(hash), "line {number}: duplicate token");
        Ok((hash, token))
    };
    lines(text).map(parse).collect()
}

/// Returns the numbered lines that are neither empty nor a comment.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

fn parse_line(line: &str) -> Result<(Hash, Token)> {
    let form = || {
        anyhow!(
            "the line is not NAME SCOPE SHA256 [/PATH-PREFIX|key-prefix=PREFIX [max-keys=N] [max-bytes=N]] [expires=TIME]"
        )
    };
    let mut words = line.split_whitespace();
    let mut next = || words.next().ok_or_else(form);
    let (name, scope, hash) = (next()?, next()?, next()?);
    check_name(name)?;
    let scope = Scope::from_str(scope, false).map_err(|_| anyhow!("the scope is not metrics, read, write or admin"))?;
    let hash = from_hex(hash).context("the hash is not 64 hexadecimal digits")?;
    let mut token = Token { name: name.into(), scope, prefix: None, quota: None, expires: None };
    for word in words {
        if let Some(time) = word.strip_prefix(EXPIRES) {
            ensure!(token.expires.is_none(), "there are two expiries");
            // The error does not show the word.
            let time = parse_rfc3339(time).map_err(|error| anyhow!("the expiry is malformed: {error}"))?;
            token.expires = Some(unix_ms(time));
        } else if let Some(number) = word.strip_prefix(MAX_KEYS) {
            limit(&mut token.quota.get_or_insert_default().keys, number)?;
        } else if let Some(number) = word.strip_prefix(MAX_BYTES) {
            limit(&mut token.quota.get_or_insert_default().bytes, number)?;
        } else {
            ensure!(token.prefix.is_none(), form());
            token.prefix = Some(parse_prefix(word)?);
        }
    }
    let has_keys = matches!(token.prefix, Some(Prefix::Key(_)));
    ensure!(token.quota.is_none() || has_keys, "max-keys and max-bytes need a key prefix, whose keys they limit");
    Ok((hash, token))
}

/// Parses a limit of a quota, which is there once.
fn limit(limit: &mut Option<u64>, number: &str) -> Result<()> {
    let number = number.parse().map_err(|_| anyhow!("a quota is not a number"))?;
    ensure!(limit.replace(number).is_none(), "a quota is there twice");
    Ok(())
}

fn parse_prefix(word: &str) -> Result<Prefix> {
    let Some(encoded) = word.strip_prefix(KEY_PREFIX) else {
        ensure!(word.starts_with('/'), "the path prefix must start with a slash");
        return Ok(Prefix::Path(word.to_owned()));
    };
    let prefix = percent_decode_str(encoded).decode_utf8().context("the key prefix is not UTF-8")?;
    check_key_prefix(&prefix).map(|prefix| Prefix::Key(prefix.into()))
}

/// Validates a key prefix, which must be the beginning of a key of clients.
pub fn check_key_prefix(prefix: &str) -> Result<String> {
    ensure!(
        (1..=MAX_PREFIX_BYTES).contains(&prefix.len()) && !prefix.chars().any(char::is_control),
        "the key prefix must be 1 to {MAX_PREFIX_BYTES} bytes long, without control characters"
    );
    Ok(prefix.to_owned())
}

/// Returns the word with a prefix in a line.
fn word_of(prefix: &Prefix) -> String {
    match prefix {
        Prefix::Path(prefix) => prefix.clone(),
        Prefix::Key(prefix) => format!("{KEY_PREFIX}{}", utf8_percent_encode(prefix, ENCODED)),
    }
}

/// Returns the words with a quota in a line, each after a space.
fn words_of(quota: Option<Quota>) -> String {
    let Quota { keys, bytes } = quota.unwrap_or_default();
    let words = [(MAX_KEYS, keys), (MAX_BYTES, bytes)];
    words.iter().filter_map(|(name, number)| Some(format!(" {name}{}", (*number)?))).collect()
}

/// Validates a name. It cannot equal the subject of a certificate, which contains an equals sign.
fn check_name(name: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    ensure!(
        (1..=64).contains(&name.len()) && name.bytes().all(fits),
        "the name must be 1 to 64 letters, digits, - _ and ."
    );
    Ok(())
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Hash> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Creates a token: shows it, then appends the line with its hash to the file. The token itself is stored nowhere, so one
/// that could not be shown is not created.
pub fn create(
    file: &Path,
    name: &str,
    scope: Scope,
    limits: &Limits,
    random: &Random,
    show: impl FnOnce(&str) -> Result<()>,
) -> Result<()> {
    check_name(name)?;
    let mut secret = [0; 32];
    random.fill(&mut secret)?;
    let token = format!("{TOKEN_PREFIX}{}", hex(&secret));
    let mut line = format!("{name} {} {}", name_of(scope), hex(&hash(token.as_bytes())));
    if let Some(prefix) = &limits.prefix {
        line += &format!(" {}", word_of(prefix));
    }
    line += &words_of(limits.quota);
    if let Some(expires) = limits.expires {
        line += &format!(" {EXPIRES}{}", format_rfc3339_seconds(expires));
    }
    parse_line(&line)?;
    match fs::read_to_string(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        text => {
            let text = text.with_context(|| format!("cannot read {}", file.display()))?;
            parse(&text).with_context(|| file.display().to_string())?;
        }
    }
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    options.open(file).with_context(|| format!("cannot write {}", file.display()))?;
    show(&token)?;
    let written = locked(file, &options).and_then(|mut opened| {
        let before = io::read_to_string(&opened)?;
        // A file that was written by hand may lack the end of its last line.
        let end = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
        opened.write_all(format!("{end}{line}\n").as_bytes())
    });
    written.with_context(|| format!("cannot write {}, so the token is not valid", file.display()))
}

/// Opens the file, which no other command changes until the result is dropped.
fn locked(file: &Path, options: &OpenOptions) -> io::Result<File> {
    loop {
        let opened = options.open(file)?;
        opened.lock()?;
        // Who had the lock may have replaced the file.
        if opened.metadata()?.ino() == fs::metadata(file)?.ino() {
            return Ok(opened);
        }
    }
}

/// Lists the tokens, without the tokens themselves: id, name, scope, expiry and prefix.
pub fn list(file: &Path, output: Output, out: &mut dyn Write) -> Result<()> {
    let (_, tokens) = read(file)?;
    for (hash, Token { name, scope, prefix, quota, expires }) in tokens {
        let date = |expires| format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(expires)).to_string();
        let (id, scope, expires) = (id(&hash), name_of(scope), expires.map(date));
        let word = prefix.as_ref().map_or_else(String::new, |prefix| format!("  {}", word_of(prefix)));
        let expiry = expires.as_deref().unwrap_or("never");
        let line = format!("{id}  {name:<16}  {scope:<7}  {expiry:<20}{word}{}", words_of(quota));
        let Quota { keys, bytes } = quota.unwrap_or_default();
        let (path_prefix, key_prefix) = match &prefix {
            None => (None, None),
            Some(Prefix::Path(prefix)) => (Some(prefix.as_str()), None),
            Some(Prefix::Key(prefix)) => (None, Some(&**prefix)),
        };
        let object = || {
            json!({
                "id": id, "name": &*name, "scope": scope, "expires": expires,
                "path_prefix": path_prefix, "key_prefix": key_prefix, "max_keys": keys, "max_bytes": bytes,
            })
        };
        output.print(Some(&line), object, out)?;
    }
    Ok(())
}

/// Removes the tokens of a name, or the one with an id. Returns the names of the removed tokens and their ids.
pub fn revoke(file: &Path, name_or_id: &str) -> Result<Vec<(String, String)>> {
    let _lock =
        locked(file, OpenOptions::new().read(true)).with_context(|| format!("cannot read {}", file.display()))?;
    let (text, _) = read(file)?;
    let revoked = |line: &str| {
        let (hash, token) = parse_line(line.trim()).ok()?;
        let is_meant = *token.name == *name_or_id || id(&hash) == name_or_id;
        is_meant.then(|| (token.name.to_string(), id(&hash)))
    };
    let gone: Vec<_> = lines(&text).filter_map(|(_, line)| revoked(line)).collect();
    if gone.is_empty() {
        bail!("{} has no token {name_or_id}; see kvs token list", file.display());
    }
    let left: String = text.lines().filter(|line| revoked(line).is_none()).map(|line| format!("{line}\n")).collect();
    replace(file, &left).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(gone)
}

/// Replaces a file at once: a server reads it whole, before or after.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    // A link stays one.
    let file = fs::canonicalize(file)?;
    let mut name = file.clone().into_os_string();
    name.push(".new");
    let mut options = OpenOptions::new();
    let mut new = options.write(true).create(true).truncate(true).mode(0o600).open(&name)?;
    new.set_permissions(fs::metadata(&file)?.permissions())?;
    new.write_all(text.as_bytes())?;
    new.sync_all()?;
    fs::rename(&name, &file)?;
    file.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Reads an existing file, which must be valid.
fn read(file: &Path) -> Result<(String, Vec<(Hash, Token)>)> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let tokens = parse(&text).with_context(|| file.display().to_string())?;
    Ok((text, tokens))
}

/// Returns the id of a token, by which it is listed and revoked.
pub fn id(hash: &Hash) -> String {
    hex(hash)[..ID_DIGITS].to_owned()
}

fn name_of(scope: Scope) -> String {
    scope.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_file_errors_show_line_not_content() {
        let hash = "0".repeat(64);
        assert!(parse(&format!("# people\n\nalice read {hash}\n")).is_ok());
        for (text, line) in [
            ("alice".to_owned(), 1),
            (format!("\nalice all {hash}"), 2),
            (format!("alice read {hash}0"), 1),
            ("alice read kvs_secret".to_owned(), 1),
            (format!("al=ice read {hash}"), 1),
            (format!("alice read {hash} v1"), 1),
            (format!("alice read {hash} /a /b"), 1),
            (format!("alice read {hash} /a key-prefix=a"), 1),
            (format!("alice read {hash} key-prefix="), 1),
            (format!("alice read {hash} key-prefix=%ff"), 1),
            (format!("alice read {hash} key-prefix=a%0a"), 1),
            (format!("alice read {hash} expires=tomorrow"), 1),
            (format!("alice read {hash} max-keys=1"), 1),
            (format!("alice read {hash} /a max-bytes=1"), 1),
            (format!("alice read {hash} key-prefix=a max-keys=many"), 1),
            (format!("alice read {hash} key-prefix=a max-keys=1 max-keys=1"), 1),
            (format!("alice read {hash}\nbob read {hash}"), 2),
        ] {
            let error = format!("{:#}", parse(&text).err().expect("it is invalid"));
            assert!(error.starts_with(&format!("line {line}: ")) && !error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn token_is_added_after_a_line_without_end() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        fs::write(&file, "# people").expect("it can be written");
        let limits = Limits { prefix: None, quota: None, expires: None };
        for name in ["alice", "bob"] {
            create(file.path(), name, Scope::Read, &limits, &Random::system(), |_| Ok(())).expect("it is created");
        }
        let (_, tokens) = read(file.path()).expect("it is valid");
        assert_eq!(tokens.iter().map(|(_, token)| &*token.name).collect::<Vec<_>>(), ["alice", "bob"]);
    }

    #[test]
    fn line_has_prefix_and_expiry_in_any_order() {
        let hash = "0".repeat(64);
        for rest in ["/v1/a expires=2027-01-01T00:00:00Z", "expires=2027-01-01T00:00:00Z /v1/a"] {
            let (_, token) = parse_line(&format!("alice metrics {hash} {rest}")).expect("it is valid");
            assert_eq!(token.prefix, Some(Prefix::Path("/v1/a".to_owned())));
            assert_eq!((token.scope, token.expires), (Scope::Metrics, Some(1_798_761_600_000)));
        }
    }

    #[test]
    fn line_has_quota() {
        let line = format!("alice write {} key-prefix=a max-bytes=20 max-keys=0", "0".repeat(64));
        let (_, token) = parse_line(&line).expect("it is valid");
        assert_eq!(token.quota, Some(Quota { keys: Some(0), bytes: Some(20) }));
        assert_eq!(words_of(token.quota), " max-keys=0 max-bytes=20");
    }

    #[test]
    fn key_prefix_is_one_word_of_a_line() {
        for text in ["team/", "/v1/a", "a b\u{a0}%41", "ä=#", "x".repeat(MAX_PREFIX_BYTES).as_str()] {
            let prefix = Prefix::Key(text.into());
            let line = format!("alice read {} {}", "0".repeat(64), word_of(&prefix));
            assert_eq!(parse_line(&line).expect("it is valid").1.prefix, Some(prefix), "{line}");
        }
        assert!(check_key_prefix(&"x".repeat(MAX_PREFIX_BYTES + 1)).is_err());
    }
}
