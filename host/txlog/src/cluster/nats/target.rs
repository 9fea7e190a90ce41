//! Connection parameters, from a URL: `nats://USER:PASSWORD@HOST:PORT,HOST:PORT/NAME?creds=FILE`.
//!
//! Owns: the syntax of such a URL. Neither the URL nor anything secret in it is ever shown: errors name the log by
//! [`Target::name`].

use std::fmt::{self, Debug};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use async_nats::{ConnectOptions, ServerAddr};
use percent_encoding::percent_decode_str;

const FORM: &str = "--txlog must have the form nats://HOST,HOST,HOST/NAME";

/// A connection URL, which can contain a password.
#[derive(Clone)]
pub struct Url(String);

impl From<&str> for Url {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Url {
    /// Checks the form of the URL.
    pub fn check(&self) -> Result<()> {
        Target::new(self).map(drop)
    }
}

impl Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nats://...")
    }
}

/// Parsed connection parameters.
pub struct Target {
    pub servers: Vec<ServerAddr>,
    /// Name of the log.
    pub log: String,
    user: Option<(String, String)>,
    credentials: Option<PathBuf>,
    nkey: Option<PathBuf>,
    authorities: Option<PathBuf>,
    certificate: Option<(PathBuf, PathBuf)>,
    requires_tls: bool,
}

impl Target {
    pub fn new(url: &Url) -> Result<Self> {
        let rest = url.0.strip_prefix("nats://").context(FORM)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (servers, log) = rest.split_once('/').context(FORM)?;
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        ensure!(
            (1..=64).contains(&log.len()) && log.bytes().all(is_word),
            "the name of the log, after the last / of its URL, must be of 1 to 64 letters, digits, - and _"
        );
        let (user, servers) = match servers.rsplit_once('@') {
            Some((user, servers)) => {
                let (user, password) =
                    user.split_once(':').context("a user in a URL needs a password: USER:PASSWORD@HOST")?;
                (Some((decoded(user)?, decoded(password)?)), servers)
            }
            None => (None, servers),
        };
        ensure!(!servers.is_empty(), "the URL has no host");
        let addresses = servers.split(',').map(|server| {
            let address: Result<ServerAddr, _> = format!("nats://{server}").parse();
            address.map_err(|_| anyhow!("{server:?} is not a host, or a host and a port"))
        });
        let mut target = Self {
            servers: addresses.collect::<Result<_>>()?,
            log: log.to_owned(),
            user,
            credentials: None,
            nkey: None,
            authorities: None,
            certificate: None,
            requires_tls: false,
        };
        let (mut certificate, mut key) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').context("URL parameters must have the form name=value")?;
            let value = decoded(value)?;
            match name {
                "creds" => target.credentials = Some(value.into()),
                "nkey" => target.nkey = Some(value.into()),
                "sslrootcert" => target.authorities = Some(value.into()),
                "sslcert" => certificate = Some(PathBuf::from(value)),
                "sslkey" => key = Some(PathBuf::from(value)),
                "tls" if value == "require" => target.requires_tls = true,
                _ => bail!(
                    "the URL parameter {name:?} is unknown or has another value than it can have: there are creds=FILE, \
                     nkey=FILE, tls=require, sslrootcert=FILE, sslcert=FILE and sslkey=FILE"
                ),
            }
        }
        target.certificate = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => bail!("sslcert and sslkey belong together"),
        };
        Ok(target)
    }

    /// Returns the name of the log for messages.
    pub fn name(&self) -> String {
        let address = |server: &ServerAddr| match (server.host(), server.port()) {
            (host, port) if host.contains(':') => format!("[{host}]:{port}"),
            (host, port) => format!("{host}:{port}"),
        };
        let servers: Vec<_> = self.servers.iter().map(address).collect();
        format!("stream KVS-{}-00 at {}", self.log, servers.join(","))
    }

    /// Returns the options of a connection, with everything that is secret.
    pub async fn options(&self) -> Result<ConnectOptions> {
        let mut options = ConnectOptions::new().name("kvs");
        if let Some((user, password)) = &self.user {
            options = options.user_and_password(user.clone(), password.clone());
        }
        if let Some(file) = &self.credentials {
            let unreadable = || format!("cannot read the credentials in {}", file.display());
            options = options.credentials_file(file).await.with_context(unreadable)?;
        }
        if let Some(file) = &self.nkey {
            let seed =
                fs::read_to_string(file).with_context(|| format!("cannot read the NKey in {}", file.display()))?;
            options = options.nkey(seed.trim().to_owned());
        }
        if let Some(file) = &self.authorities {
            options = options.add_root_certificates(file.clone()).require_tls(true);
        }
        if let Some((certificate, key)) = &self.certificate {
            options = options.add_client_certificate(certificate.clone(), key.clone()).require_tls(true);
        }
        Ok(if self.requires_tls { options.require_tls(true) } else { options })
    }
}

fn decoded(text: &str) -> Result<String> {
    Ok(percent_decode_str(text).decode_utf8().context("a part of the URL is not UTF-8")?.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<Target> {
        Target::new(&url.into())
    }

    #[test]
    fn url_names_servers_log_and_secrets() {
        let target = parsed("nats://a%40b:s%3Acret@one,two:5222,[::1]:6222/store?creds=%2Fa%20b&tls=require").unwrap();
        assert_eq!(target.name(), "stream KVS-store-00 at one:4222,two:5222,[::1]:6222");
        assert_eq!(target.user, Some(("a@b".into(), "s:cret".into())));
        assert_eq!((target.credentials, target.requires_tls), (Some("/a b".into()), true));
        assert_eq!(format!("{:?}", Url::from("nats://a:b@c/d")), "nats://...");
    }

    #[test]
    fn malformed_urls_are_rejected_without_their_secrets() {
        for url in [
            "nats://a:secret@one",
            "nats:///x",
            "nats://a:secret@one/",
            "nats://a:secret@one/x.y",
            "nats://secret@one/x",
            "nats://a:secret@one/x?sslcert=y",
            "nats://a:secret@one/x?other=y",
            "postgres://a:secret@b/c",
        ] {
            let error = format!("{:#}", parsed(url).err().expect(url));
            assert!(!error.contains("secret"), "{url}: {error}");
        }
    }
}
