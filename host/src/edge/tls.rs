//! TLS: certificates, keys, and the authentication of clients by certificates.
//!
//! Owns: the validation of certificates of server and clients. Must never know: HTTP, or the permissions of a client.

use std::fmt;
use std::fs;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use kvs_metrics::{Measured, Page};
use kvs_runtime::Clock;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{HandshakeKind, InconsistentKeys, ProtocolVersion, RootCertStore, ServerConfig, version};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::fresh::Fresh;

/// ALPN names of HTTP/2 and HTTP/1.1.
const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";
/// Interval at which client certificates of open connections are verified again when no file changes, unless keep-alives of a
/// watch come more often.
const RECHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Files and options of TLS.
#[derive(Clone, Debug)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub least: Least,
    pub client: Option<ClientFiles>,
}

/// Files and options of client certificates.
#[derive(Clone, Debug)]
pub struct ClientFiles {
    pub authorities: PathBuf,
    pub revoked: Option<PathBuf>,
    pub demand: Demand,
}

/// Minimum version of TLS.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Least {
    #[value(name = "1.2")]
    Tls12,
    #[value(name = "1.3")]
    Tls13,
}

/// Whether clients must present a certificate. A presented one must be valid in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Demand {
    Optional,
    Required,
}

/// The reloadable TLS configuration.
pub type Tls = Fresh<Acceptance>;

/// TLS configuration of the server.
pub struct Acceptance {
    pub config: Arc<ServerConfig>,
    /// Configuration of the admin listener: HTTP/1.1, and no client certificates, which probes do not have.
    pub admin: Arc<ServerConfig>,
    /// None without client certificates.
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// When the first certificate of the chain to expire does.
    expires: SystemTime,
    clock: Clock,
}

impl Measured for Tls {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let since = self.get().expires.duration_since(UNIX_EPOCH).unwrap_or_default();
        let help = "Time at which the first certificate of the chain expires, in seconds since 1970";
        page.gauge("tls_certificate_expiry_timestamp_seconds", help, since.as_secs())
    }
}

/// Loads the files, and reloads them when they change.
pub fn load(files: Files, clock: Clock) -> Result<Arc<Tls>> {
    let mut all = vec![files.certificate.clone(), files.key.clone()];
    if let Some(client) = &files.client {
        all.push(client.authorities.clone());
        all.extend(client.revoked.clone());
    }
    Fresh::new("the TLS certificate", all, clock.clone(), move |_: Option<&_>| config(&files, &clock))
}

fn config(files: &Files, clock: &Clock) -> Result<Acceptance> {
    let chain = certificates(&files.certificate, "--tls-cert")?;
    let mut expires = None;
    for certificate in &chain {
        let expiry =
            valid_now(certificate, clock).with_context(|| format!("--tls-cert {}", files.certificate.display()))?;
        expires = Some(expires.map_or(expiry, |expires: SystemTime| expires.min(expiry)));
    }
    let expires = expires.context("the chain is empty")?;
    let key = key(&files.key)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let versions = match files.least {
        Least::Tls12 => &[&version::TLS13, &version::TLS12][..],
        Least::Tls13 => &[&version::TLS13],
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions)?;
    let verifier = files.client.as_ref().map(|client| verifier(client, provider)).transpose()?;
    let mut admin = builder.clone().with_no_client_auth().with_single_cert(chain.clone(), key.clone_key());
    if let Ok(admin) = &mut admin {
        admin.alpn_protocols = vec![HTTP1.to_vec()];
    }
    let builder = match &verifier {
        None => builder.with_no_client_auth(),
        Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => anyhow!(
            "the key in {} does not belong to the certificate in {}; use a matching pair",
            files.key.display(),
            files.certificate.display()
        ),
        error => anyhow!("--tls-key {}: {error}; use a key of type RSA, ECDSA or Ed25519", files.key.display()),
    })?;
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(Acceptance { config: Arc::new(config), admin: Arc::new(admin?), verifier, expires, clock: clock.clone() })
}

impl Acceptance {
    /// Verifies the certificates of a client as of now.
    fn verify(&self, shown: &[CertificateDer<'static>]) -> Result<(), rustls::Error> {
        let (Some(verifier), Some((certificate, chain))) = (&self.verifier, shown.split_first()) else { return Ok(()) };
        let now = UnixTime::since_unix_epoch(Duration::from_millis(self.clock.unix_ms()));
        verifier.verify_client_cert(certificate, chain, now).map(drop)
    }
}

/// Verifies what the handshake did not: a resumed session has a certificate that was valid when the session began.
pub fn verify_resumed<S>(tls: &Tls, stream: &TlsStream<S>) -> Result<(), rustls::Error> {
    match stream.get_ref().1.handshake_kind() {
        Some(HandshakeKind::Resumed) => tls.get().verify(&shown(stream)),
        _ => Ok(()),
    }
}

/// Waits until the certificate of a client becomes invalid: it was revoked or expired, or its CA was removed. `renewals` must
/// have been created before the certificate was verified; `heartbeat` is the interval of a watch's keep-alives.
pub async fn revoked(
    tls: &Tls,
    shown: Vec<CertificateDer<'static>>,
    mut renewals: watch::Receiver<()>,
    heartbeat: Duration,
) -> rustls::Error {
    if shown.is_empty() {
        return pending().await;
    }
    loop {
        // Expiry depends on the clock, which can be set.
        let _ = timeout(heartbeat.min(RECHECK_INTERVAL), renewals.changed()).await;
        if let Err(error) = tls.get().verify(&shown) {
            return error;
        }
    }
}

/// Returns the verified certificates of a client.
pub fn shown<S>(stream: &TlsStream<S>) -> Vec<CertificateDer<'static>> {
    stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec()
}

fn verifier(files: &ClientFiles, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>> {
    let name = |flag: &str, file: &Path| format!("{flag} {}", file.display());
    let mut roots = RootCertStore::empty();
    for authority in certificates(&files.authorities, "--client-ca")? {
        roots.add(authority).with_context(|| name("--client-ca", &files.authorities))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    if let Some(file) = &files.revoked {
        let lists = CertificateRevocationListDer::pem_slice_iter(&read(file, "--client-crl")?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| anyhow!("{}: {error}", name("--client-crl", file)))?;
        ensure!(!lists.is_empty(), "{} contains no PEM revocation list", name("--client-crl", file));
        builder = builder.with_crls(lists);
    }
    if files.demand == Demand::Optional {
        builder = builder.allow_unauthenticated();
    }
    builder.build().with_context(|| name("--client-ca", &files.authorities))
}

fn certificates(file: &Path, flag: &str) -> Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(&read(file, flag)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| anyhow!("{flag} {}: {error}", file.display()))?;
    ensure!(!certificates.is_empty(), "{flag} {} contains no PEM certificate", file.display());
    Ok(certificates)
}

fn key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    let pem = read(file, "--tls-key")?;
    if pem.windows(9).any(|window| window == b"ENCRYPTED") {
        bail!("--tls-key {} is encrypted; decrypt it first, for example with: openssl pkey", file.display());
    }
    // The original error would show bytes of the key.
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| anyhow!("--tls-key {} contains no PEM private key", file.display()))
}

fn read(file: &Path, flag: &str) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {flag} {}", file.display()))
}

/// Checks the validity period: clients would reject the certificate. Returns its end.
fn valid_now(certificate: &CertificateDer<'_>, clock: &Clock) -> Result<SystemTime> {
    let certificate = Certificate::from_der(certificate).context("a certificate is malformed")?;
    let validity = certificate.tbs_certificate.validity;
    let now = clock.wall();
    let (from, to) = (validity.not_before, validity.not_after);
    ensure!(
        from.to_system_time() <= now,
        "the certificate is not valid before {from}; check the clock, or use another one"
    );
    ensure!(now <= to.to_system_time(), "the certificate expired at {to}; renew it");
    Ok(to.to_system_time())
}

/// Returns whether HTTP/2 was negotiated.
pub fn speaks_http2<S>(stream: &TlsStream<S>) -> bool {
    stream.get_ref().1.alpn_protocol() == Some(HTTP2)
}

/// Returns the TLS version of a connection, by its usual name.
pub fn version<S>(stream: &TlsStream<S>) -> &'static str {
    match stream.get_ref().1.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "TLSv1.2",
    }
}

/// Returns the subject of the verified certificate of a client, in the format of RFC 4514.
pub fn identity<S>(stream: &TlsStream<S>) -> Option<Arc<str>> {
    let shown = stream.get_ref().1.peer_certificates()?.first()?;
    let subject = Certificate::from_der(shown).ok()?.tbs_certificate.subject.to_string();
    // A certificate without a subject authenticates a client without a name.
    if subject.is_empty() { None } else { Some(subject.into()) }
}
