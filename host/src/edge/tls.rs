//! TLS: certificates and keys in, connections with a known client out.
//!
//! Owns: what is accepted of a certificate, ours or a client's. Must never know: HTTP, what a client may do.

use std::fs;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
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

/// HTTP/2, as ALPN names it.
const HTTP2: &[u8] = b"h2";
/// How often a certificate that was shown is verified again when no file changes, unless a watch shows sooner that it goes on.
const LOOK: Duration = Duration::from_secs(60);

/// The files TLS is made of, and how much it asks of a client.
#[derive(Clone, Debug)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub least: Least,
    pub client: Option<ClientFiles>,
}

#[derive(Clone, Debug)]
pub struct ClientFiles {
    pub authorities: PathBuf,
    pub revoked: Option<PathBuf>,
    pub demand: Demand,
}

/// The oldest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Least {
    #[value(name = "1.2")]
    Tls12,
    #[value(name = "1.3")]
    Tls13,
}

/// Whether a client must show a certificate. One that is shown must be good in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Demand {
    Optional,
    Required,
}

/// The TLS that is in force.
pub type Tls = Fresh<Acceptance>;

/// How connections are accepted.
pub struct Acceptance {
    pub config: Arc<ServerConfig>,
    /// None where no certificates of clients are asked for.
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    clock: Clock,
}

/// Reads the files, again whenever they change.
pub fn load(files: Files, clock: Clock) -> Result<Arc<Tls>> {
    let mut all = vec![files.certificate.clone(), files.key.clone()];
    if let Some(client) = &files.client {
        all.push(client.authorities.clone());
        all.extend(client.revoked.clone());
    }
    Fresh::new("the TLS certificate", all, move || config(&files, &clock))
}

fn config(files: &Files, clock: &Clock) -> Result<Acceptance> {
    let chain = certificates(&files.certificate, "--tls-cert")?;
    for certificate in &chain {
        valid_now(certificate, clock).with_context(|| format!("--tls-cert {}", files.certificate.display()))?;
    }
    let key = key(&files.key)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let versions = match files.least {
        Least::Tls12 => &[&version::TLS13, &version::TLS12][..],
        Least::Tls13 => &[&version::TLS13],
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions)?;
    let verifier = files.client.as_ref().map(|client| verifier(client, provider)).transpose()?;
    let builder = match &verifier {
        None => builder.with_no_client_auth(),
        Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => anyhow!(
            "the key in {} does not belong to the certificate in {}; give the pair that was made together",
            files.key.display(),
            files.certificate.display()
        ),
        error => anyhow!("--tls-key {}: {error}; give a key of type RSA, ECDSA or Ed25519", files.key.display()),
    })?;
    config.alpn_protocols = vec![HTTP2.to_vec(), b"http/1.1".to_vec()];
    Ok(Acceptance { config: Arc::new(config), verifier, clock: clock.clone() })
}

impl Acceptance {
    /// Whether the certificates that a client showed are good now.
    fn verify(&self, shown: &[CertificateDer<'static>]) -> Result<(), rustls::Error> {
        let (Some(verifier), Some((certificate, chain))) = (&self.verifier, shown.split_first()) else { return Ok(()) };
        let now = UnixTime::since_unix_epoch(Duration::from_millis(self.clock.unix_ms()));
        verifier.verify_client_cert(certificate, chain, now).map(drop)
    }
}

/// Checks what the handshake did not: a session that is resumed is that of a certificate which was good then.
pub fn verify_resumed<S>(tls: &Tls, stream: &TlsStream<S>) -> Result<(), rustls::Error> {
    match stream.get_ref().1.handshake_kind() {
        Some(HandshakeKind::Resumed) => tls.get().verify(&shown(stream)),
        _ => Ok(()),
    }
}

/// Returns when the certificate that a client showed is not good any more: it was revoked or expired, or its authority is gone.
/// `renewals` are those since before it was found good; `heartbeat` is when a watch shows that it goes on.
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
        // Its end comes by the clock, which can be set.
        let _ = timeout(heartbeat.min(LOOK), renewals.changed()).await;
        if let Err(error) = tls.get().verify(&shown) {
            return error;
        }
    }
}

/// The certificates that a client showed and that were found good.
pub fn shown<S>(stream: &TlsStream<S>) -> Vec<CertificateDer<'static>> {
    stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec()
}

fn verifier(files: &ClientFiles, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>> {
    let told = |flag: &str, file: &Path| format!("{flag} {}", file.display());
    let mut roots = RootCertStore::empty();
    for authority in certificates(&files.authorities, "--client-ca")? {
        roots.add(authority).with_context(|| told("--client-ca", &files.authorities))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    if let Some(file) = &files.revoked {
        let lists = CertificateRevocationListDer::pem_slice_iter(&read(file, "--client-crl")?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| anyhow!("{}: {error}", told("--client-crl", file)))?;
        ensure!(!lists.is_empty(), "{} has no revocation list in PEM", told("--client-crl", file));
        builder = builder.with_crls(lists);
    }
    if files.demand == Demand::Optional {
        builder = builder.allow_unauthenticated();
    }
    builder.build().with_context(|| told("--client-ca", &files.authorities))
}

fn certificates(file: &Path, flag: &str) -> Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(&read(file, flag)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| anyhow!("{flag} {}: {error}", file.display()))?;
    ensure!(!certificates.is_empty(), "{flag} {} has no certificate in PEM", file.display());
    Ok(certificates)
}

fn key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    let pem = read(file, "--tls-key")?;
    if pem.windows(9).any(|window| window == b"ENCRYPTED") {
        bail!("--tls-key {} is encrypted; decrypt it first, for instance with: openssl pkey", file.display());
    }
    // The error would show bytes of what may be a key.
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| anyhow!("--tls-key {} has no private key in PEM", file.display()))
}

fn read(file: &Path, flag: &str) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("{flag} {} cannot be read", file.display()))
}

/// Clients would refuse it: better to hear of it here.
fn valid_now(certificate: &CertificateDer<'_>, clock: &Clock) -> Result<()> {
    let certificate = Certificate::from_der(certificate).context("a certificate that cannot be understood")?;
    let validity = certificate.tbs_certificate.validity;
    let now = clock.wall();
    let (from, to) = (validity.not_before, validity.not_after);
    ensure!(
        from.to_system_time() <= now,
        "the certificate is not valid before {from}; check the clock, or give another"
    );
    ensure!(now <= to.to_system_time(), "the certificate expired at {to}; give a new one");
    Ok(())
}

/// Whether HTTP/2 was agreed on.
pub fn speaks_http2<S>(stream: &TlsStream<S>) -> bool {
    stream.get_ref().1.alpn_protocol() == Some(HTTP2)
}

/// The version that a connection speaks, in the field's own words.
pub fn version<S>(stream: &TlsStream<S>) -> &'static str {
    match stream.get_ref().1.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "TLSv1.2",
    }
}

/// The subject of the certificate that the client showed and that was found good, as RFC 4514 writes it.
pub fn identity<S>(stream: &TlsStream<S>) -> Option<Arc<str>> {
    let shown = stream.get_ref().1.peer_certificates()?.first()?;
    let subject = Certificate::from_der(shown).ok()?.tbs_certificate.subject.to_string();
    // A certificate can be without a subject; then it says that the client may come in, and not who it is.
    if subject.is_empty() { None } else { Some(subject.into()) }
}
