//! TLS to the database, with the modes of libpq. The default is full verification.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// Verification of the server, the `sslmode` of libpq.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
pub enum TlsMode {
    /// No TLS.
    Disable,
    /// TLS if the server supports it, without verification.
    Prefer,
    /// TLS without verification.
    Require,
    /// The certificate must be issued by a trusted CA.
    VerifyCa,
    /// The certificate must be issued by a trusted CA for the requested host.
    #[default]
    VerifyFull,
}

/// TLS options of a connection.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    pub mode: TlsMode,
    /// CA certificates; those of the system if None.
    pub authorities: Option<PathBuf>,
    /// Client certificate.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

impl TlsOptions {
    pub fn config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder =
            ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let verifier: Arc<dyn ServerCertVerifier> = match self.mode {
            TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => {
                Arc::new(PartialVerifier { provider, verifier: None })
            }
            TlsMode::VerifyCa => {
                let verifier = Some(self.verifier(Arc::clone(&provider))?);
                Arc::new(PartialVerifier { provider, verifier })
            }
            TlsMode::VerifyFull => self.verifier(provider)?,
        };
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => {
                let chain = certificates(certificate)?;
                let key = PrivateKeyDer::from_pem_file(key).with_context(|| unreadable("sslkey", key))?;
                builder.with_client_auth_cert(chain, key).context("sslcert and sslkey do not match")
            }
            (None, None) => Ok(builder.with_no_client_auth()),
            _ => anyhow::bail!("sslcert and sslkey must be given together"),
        }
    }

    fn verifier(&self, provider: Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>> {
        let mut roots = RootCertStore::empty();
        let authorities = match &self.authorities {
            Some(file) => certificates(file)?,
            None => rustls_native_certs::load_native_certs().certs,
        };
        roots.add_parsable_certificates(authorities);
        ensure!(!roots.is_empty(), "no CA certificates; give them in PEM with sslrootcert");
        Ok(WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build()?)
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(file)?.collect::<Result<Vec<_>, _>>();
    let certificates = read().with_context(|| unreadable("a certificate", file))?;
    ensure!(!certificates.is_empty(), "{} contains no PEM certificate", file.display());
    Ok(certificates)
}

fn unreadable(what: &str, file: &Path) -> String {
    format!("cannot read {what} from {}", file.display())
}

/// Certificate verifier for the modes below `verify-full`: it ignores the host name, and without an inner verifier also the
/// CA. The server still has to prove that it has the key of its certificate.
#[derive(Debug)]
struct PartialVerifier {
    provider: Arc<CryptoProvider>,
    verifier: Option<Arc<WebPkiServerVerifier>>,
}

impl ServerCertVerifier for PartialVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(verifier) = &self.verifier else { return Ok(ServerCertVerified::assertion()) };
        match verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is checked last.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
