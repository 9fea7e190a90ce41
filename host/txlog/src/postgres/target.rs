//! Connection parameters, from a URL as libpq accepts it: `postgres://user@host:port/database?sslmode=...`.
//!
//! Owns: the syntax of such a URL, and the sources of a password that is not in it. Neither the URL nor the password is ever
//! shown: errors name the database by [`Target::name`].

use std::fmt::{self, Debug};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, anyhow, bail, ensure};
use percent_encoding::percent_decode_str;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode};

use super::tls::{TlsMode, TlsOptions};

/// Default idle time before TCP keep-alive probes.
const KEEPALIVE: Duration = Duration::from_secs(10);
const PORT: u16 = 5432;

/// A connection URL, which can contain a password.
#[derive(Clone)]
pub struct Url(String);

impl From<&str> for Url {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Url {
    /// Checks the form of the URL, and of what it names on this machine.
    pub fn check(&self) -> Result<()> {
        Target::new(self, Duration::ZERO).map(drop)
    }
}

impl Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("postgres://...")
    }
}

/// Parsed connection parameters.
pub struct Target {
    pub config: Config,
    pub tls: TlsOptions,
}

impl Target {
    /// Parses a URL. `timeout` is the default connect timeout.
    pub fn new(url: &Url, timeout: Duration) -> Result<Self> {
        ensure!(
            url.0.starts_with("postgres://") || url.0.starts_with("postgresql://"),
            "--txlog must be `file` or postgres://USER@HOST/DATABASE"
        );
        let (base, query) = url.0.split_once('?').unwrap_or((&url.0, ""));
        let (mut tls, mut passfile, mut rest) = (TlsOptions::default(), None, Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').context("URL parameters must have the form name=value")?;
            let value = percent_decode_str(value).decode_utf8().context("a URL parameter is not UTF-8")?;
            let file = || Some(PathBuf::from(&*value));
            match name {
                "sslmode" => tls.mode = TlsMode::named(&value)?,
                "sslrootcert" => tls.authorities = file(),
                "sslcert" => tls.certificate = file(),
                "sslkey" => tls.key = file(),
                "passfile" => passfile = file(),
                _ => rest.push(pair),
            }
        }
        let known = if rest.is_empty() { base.to_owned() } else { format!("{base}?{}", rest.join("&")) };
        // The error itself may show the URL, its source does not.
        let mut config: Config = known.parse().map_err(|error: tokio_postgres::Error| {
            anyhow!("{}", std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string))
        })?;
        ensure!(!config.get_hosts().is_empty(), "the URL has no host");
        config.ssl_mode(match tls.mode {
            TlsMode::Disable => SslMode::Disable,
            TlsMode::Prefer => SslMode::Prefer,
            _ => SslMode::Require,
        });
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(timeout);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(timeout);
        }
        config.keepalives_idle(KEEPALIVE);
        if config.get_application_name().is_none() {
            config.application_name("kvs");
        }
        let mut target = Self { config, tls };
        if target.config.get_password().is_none()
            && let Some(password) = target.password(passfile)?
        {
            target.config.password(password);
        }
        Ok(target)
    }

    /// Returns the name of the database for messages.
    pub fn name(&self) -> String {
        format!("database {:?} at {}", self.database(), self.address())
    }

    /// Returns the host, or the directory of the socket, and the port.
    pub fn address(&self) -> String {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            Some(Host::Unix(path)) => path.display().to_string(),
            None => "nowhere".into(),
        };
        format!("{host}:{}", self.port())
    }

    fn user(&self) -> String {
        self.config.get_user().map_or_else(|| env::var("USER").unwrap_or_default(), str::to_owned)
    }

    fn database(&self) -> String {
        self.config.get_dbname().map_or_else(|| self.user(), str::to_owned)
    }

    fn port(&self) -> u16 {
        self.config.get_ports().first().copied().unwrap_or(PORT)
    }

    /// Reads the password from the environment, or from a password file.
    fn password(&self, passfile: Option<PathBuf>) -> Result<Option<String>> {
        if let Ok(password) = env::var("PGPASSWORD") {
            return Ok(Some(password));
        }
        let named = passfile.or_else(|| env::var_os("PGPASSFILE").map(PathBuf::from));
        let is_explicit = named.is_some();
        let Some(file) = named.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".pgpass"))) else {
            return Ok(None);
        };
        let text = match fs::read_to_string(&file) {
            Err(_) if !is_explicit => return Ok(None),
            read => read.with_context(|| format!("cannot read the password file {}", file.display()))?,
        };
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            _ => "localhost".into(),
        };
        let wanted = [host, self.port().to_string(), self.database(), self.user()];
        Ok(text.lines().find_map(|line| password_in(line, &wanted)))
    }
}

/// Returns the password of a line `host:port:database:user:password` if it matches; `*` matches everything.
fn password_in(line: &str, wanted: &[String; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => fields.last_mut()?.extend(characters.next()),
            ':' if fields.len() < 5 => fields.push(String::new()),
            _ => fields.last_mut()?.push(character),
        }
    }
    let [patterns @ .., password] = &fields[..] else { return None };
    let matches =
        patterns.len() == 4 && patterns.iter().zip(wanted).all(|(field, wanted)| field == "*" || field == wanted);
    matches.then(|| password.clone())
}

impl TlsMode {
    fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "disable" => Self::Disable,
            "allow" | "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => bail!("sslmode must be disable, prefer, require, verify-ca or verify-full"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Result<Target> {
        Target::new(&Url::from(url), Duration::from_secs(5))
    }

    #[test]
    fn url_is_parsed_like_by_libpq() {
        let target =
            target("postgres://me:a%20b@db:6000/logs?sslmode=verify-ca&sslrootcert=%2Fca.pem&application_name=x")
                .expect("it is a good one");
        assert_eq!(target.name(), "database \"logs\" at db:6000");
        assert_eq!(target.config.get_password(), Some(&b"a b"[..]));
        assert_eq!((target.tls.mode, target.tls.authorities), (TlsMode::VerifyCa, Some("/ca.pem".into())));
        assert_eq!(target.config.get_application_name(), Some("x"));
        assert_eq!(target.config.get_ssl_mode(), SslMode::Require);
    }

    #[test]
    fn database_defaults_to_the_user() {
        assert_eq!(target("postgres://me@db").expect("it is a good one").name(), "database \"me\" at db:5432");
    }

    #[test]
    fn sslmode_defaults_to_verify_full() {
        assert_eq!(target("postgres://me@db/logs").expect("it is a good one").tls.mode, TlsMode::VerifyFull);
    }

    #[test]
    fn url_errors_do_not_show_the_password() {
        for wrong in [
            "postgres://me:secret@db/logs?sslmode=maybe",
            "postgres://me:secret@db/logs?colour=red",
            "postgres://me:secret@db:port/logs",
            "postgres://me:secret@",
            "postgres://me:secret@db/logs?x",
        ] {
            let error = format!("{:#}", target(wrong).err().expect("it is refused"));
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(!format!("{:?}", Url::from("postgres://me:secret@db")).contains("secret"));
    }

    #[test]
    fn password_file_is_parsed_like_by_libpq() {
        let wanted = ["db", "5432", "logs", "me"].map(str::to_owned);
        for (line, password) in [
            ("db:5432:logs:me:secret", Some("secret")),
            ("*:*:*:*:a:b", Some("a:b")),
            (r"db:*:logs:me:a\:b\\c", Some(r"a:b\c")),
            ("db:5433:logs:me:secret", None),
            ("#db:5432:logs:me:secret", None),
            ("db:5432:logs", None),
            ("", None),
        ] {
            assert_eq!(password_in(line, &wanted).as_deref(), password, "{line}");
        }
    }
}
