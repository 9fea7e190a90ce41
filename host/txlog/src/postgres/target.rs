//! Where the database is and who asks, as people write it for libpq: `postgres://user@host:port/database?sslmode=...`.
//!
//! Owns: what such a URL may say, and where the password comes from when it does not. Neither the URL nor the password is
//! ever shown: [`Target::name`] is what errors call the database.

use std::fmt::{self, Debug};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, anyhow, bail, ensure};
use percent_encoding::percent_decode_str;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode};

use super::tls::{Trust, Verify};

/// A dead connection is found out within this, where the URL says nothing else.
const KEEPALIVE: Duration = Duration::from_secs(10);
const PORT: u16 = 5432;

/// The text of a URL, which can hold a password.
#[derive(Clone)]
pub struct Url(String);

impl From<&str> for Url {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("postgres://...")
    }
}

/// What is needed to connect.
pub struct Target {
    pub config: Config,
    pub trust: Trust,
}

impl Target {
    /// `timeout` is how long a connection may take to be made, where the URL says nothing else.
    pub fn new(url: &Url, timeout: Duration) -> Result<Self> {
        ensure!(
            url.0.starts_with("postgres://") || url.0.starts_with("postgresql://"),
            "a log is `file` or looks like postgres://USER@HOST/DATABASE"
        );
        let (base, query) = url.0.split_once('?').unwrap_or((&url.0, ""));
        let (mut trust, mut passfile, mut rest) = (Trust::default(), None, Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').context("its parameters look like name=value")?;
            let value = percent_decode_str(value).decode_utf8().context("a parameter is not UTF-8")?;
            let file = || Some(PathBuf::from(&*value));
            match name {
                "sslmode" => trust.verify = Verify::named(&value)?,
                "sslrootcert" => trust.authorities = file(),
                "sslcert" => trust.certificate = file(),
                "sslkey" => trust.key = file(),
                "passfile" => passfile = file(),
                _ => rest.push(pair),
            }
        }
        let known = if rest.is_empty() { base.to_owned() } else { format!("{base}?{}", rest.join("&")) };
        // Its error may show what was parsed, but for the reason.
        let mut config: Config = known.parse().map_err(|error: tokio_postgres::Error| {
            anyhow!("{}", std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string))
        })?;
        ensure!(!config.get_hosts().is_empty(), "it names no host");
        config.ssl_mode(match trust.verify {
            Verify::Disable => SslMode::Disable,
            Verify::Prefer => SslMode::Prefer,
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
        let mut target = Self { config, trust };
        if target.config.get_password().is_none()
            && let Some(password) = target.password(passfile)?
        {
            target.config.password(password);
        }
        Ok(target)
    }

    /// What it is called in front of people.
    pub fn name(&self) -> String {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            Some(Host::Unix(path)) => path.display().to_string(),
            None => "nowhere".into(),
        };
        format!("database {:?} at {host}:{}", self.database(), self.port())
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

    /// From the environment, or from a file of passwords.
    fn password(&self, passfile: Option<PathBuf>) -> Result<Option<String>> {
        if let Ok(password) = env::var("PGPASSWORD") {
            return Ok(Some(password));
        }
        let named = passfile.or_else(|| env::var_os("PGPASSFILE").map(PathBuf::from));
        let asked = named.is_some();
        let Some(file) = named.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".pgpass"))) else {
            return Ok(None);
        };
        let text = match fs::read_to_string(&file) {
            Err(_) if !asked => return Ok(None),
            read => read.with_context(|| format!("the file of passwords {} cannot be read", file.display()))?,
        };
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            _ => "localhost".into(),
        };
        let wanted = [host, self.port().to_string(), self.database(), self.user()];
        Ok(text.lines().find_map(|line| password_in(line, &wanted)))
    }
}

/// The password of a line `host:port:database:user:password`, if it is about these; `*` is about all.
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
    let [about @ .., password] = &fields[..] else { return None };
    let fits = about.len() == 4 && about.iter().zip(wanted).all(|(field, wanted)| field == "*" || field == wanted);
    fits.then(|| password.clone())
}

impl Verify {
    fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "disable" => Self::Disable,
            "allow" | "prefer" => Self::Prefer,
            "require" => Self::Nothing,
            "verify-ca" => Self::Authority,
            "verify-full" => Self::Full,
            _ => bail!("sslmode is disable, prefer, require, verify-ca or verify-full"),
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
    fn a_url_says_what_libpq_would_understand() {
        let target =
            target("postgres://me:a%20b@db:6000/logs?sslmode=verify-ca&sslrootcert=%2Fca.pem&application_name=x")
                .expect("it is a good one");
        assert_eq!(target.name(), "database \"logs\" at db:6000");
        assert_eq!(target.config.get_password(), Some(&b"a b"[..]));
        assert_eq!((target.trust.verify, target.trust.authorities), (Verify::Authority, Some("/ca.pem".into())));
        assert_eq!(target.config.get_application_name(), Some("x"));
        assert_eq!(target.config.get_ssl_mode(), SslMode::Require);
    }

    #[test]
    fn a_database_has_the_name_of_its_user_where_nothing_else_is_said() {
        assert_eq!(target("postgres://me@db").expect("it is a good one").name(), "database \"me\" at db:5432");
    }

    #[test]
    fn without_a_word_about_tls_the_server_is_verified() {
        assert_eq!(target("postgres://me@db/logs").expect("it is a good one").trust.verify, Verify::Full);
    }

    #[test]
    fn what_is_wrong_is_told_without_the_password() {
        for wrong in [
            "postgres://me:secret@db/logs?sslmode=maybe",
            "postgres://me:secret@db/logs?colour=red",
            "postgres://me:secret@db:port/logs",
            "postgres://me:secret@",
            "postgres://me:secret@db/logs?x",
        ] {
            let told = format!("{:#}", target(wrong).err().expect("it is refused"));
            assert!(!told.contains("secret"), "{told}");
        }
        assert!(!format!("{:?}", Url::from("postgres://me:secret@db")).contains("secret"));
    }

    #[test]
    fn a_file_of_passwords_is_read_as_libpq_reads_it() {
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
