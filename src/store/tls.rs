//! TLS to PostgreSQL: what is trusted, and how strictly, in libpq's terms.
//!
//! `verify-full` and `require` check the certificate and the host's name; `verify-ca` the certificate; `prefer` (also the
//! default) and `allow` accept any certificate, as they would accept no encryption, but log it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature_with_raw_key;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::warn;

use crate::config::{CaFile, Config, DatabaseUrl};

/// How strictly a certificate is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Any certificate is accepted.
    Lenient,
    /// A trusted authority must have signed it.
    Authority,
    /// It must also match the host name.
    Full,
}

impl Strictness {
    /// Interprets libpq's `sslmode`.
    #[must_use]
    pub fn of(ssl_mode: Option<&str>) -> Self {
        match ssl_mode {
            Some("require" | "verify-full") => Self::Full,
            Some("verify-ca") => Self::Authority,
            _ => Self::Lenient,
        }
    }

    fn pardons(self, error: &CertificateError) -> bool {
        match self {
            Self::Lenient => true,
            Self::Authority => matches!(
                error,
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            ),
            Self::Full => false,
        }
    }
}

/// The TLS connector for the driver.
///
/// # Errors
///
/// There is no authority to trust.
pub fn connector(config: &Config) -> Result<MakeRustlsConnect> {
    let mode = config.database_url.as_ref().and_then(DatabaseUrl::ssl_mode);
    let roots = roots(config.database_ca.as_ref().map(CaFile::pem));
    let inner = WebPkiServerVerifier::builder(Arc::new(roots)).build().context("TLS authorities")?;
    let verifier = Verifier { inner, strictness: Strictness::of(mode), said: AtomicBool::new(false) };
    Ok(MakeRustlsConnect::new(
        ClientConfig::builder()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth(),
    ))
}

/// The given authorities alone; else the machine's own, including private ones that it trusts; else Mozilla's.
fn roots(pem: Option<&[u8]>) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    if let Some(pem) = pem {
        roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
    }
    roots
}

/// The subject's public key of a certificate of any version (RFC 5280, 4.1): within the first part, behind the version
/// where there is one, serial number, algorithm, issuer, validity and subject.
fn public_key<'a>(certificate: &'a CertificateDer<'_>) -> Option<SubjectPublicKeyInfoDer<'a>> {
    let (_, certificate, _) = element(certificate)?;
    let (_, mut rest, _) = element(certificate)?;
    if rest.first() == Some(&0xa0) {
        rest = element(rest)?.2;
    }
    for _ in 0..5 {
        rest = element(rest)?.2;
    }
    Some(SubjectPublicKeyInfoDer::from(element(rest)?.0))
}

/// The first element of DER: all of it, its content, and what follows it.
fn element(der: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (&length, after) = der.get(1..)?.split_first()?;
    let (length, header) = match length {
        0..=0x7f => (usize::from(length), 2),
        0x81..=0x84 => {
            let bytes = after.get(..usize::from(length & 0x7f))?;
            (bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)), 2 + bytes.len())
        }
        _ => return None,
    };
    let (whole, rest) = der.split_at_checked(header.checked_add(length)?)?;
    Some((whole, &whole[header..], rest))
}

#[derive(Debug)]
struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    strictness: Strictness,
    said: AtomicBool,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(Error::InvalidCertificate(error)) if self.strictness.pardons(&error) => {
                if self.strictness == Strictness::Lenient && !self.said.swap(true, Ordering::Relaxed) {
                    warn!(
                        reason = %error,
                        "PostgreSQL's certificate is not trusted; without sslmode=require or stricter in \
                         DATABASE_URL, it is accepted anyway"
                    );
                }
                Ok(ServerCertVerified::assertion())
            }
            answer => answer,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match self.inner.verify_tls13_signature(message, cert, dss) {
            // If any certificate is accepted, so is one of X.509 version 1, as in libpq: the other side's possession of
            // the key can still be verified.
            Err(Error::InvalidCertificate(_)) if self.strictness == Strictness::Lenient => {
                let key = public_key(cert).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
                let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
                verify_tls13_signature_with_raw_key(message, &key, dss, &algorithms)
            }
            answer => answer,
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
