//! Whom encrypted connections to other people's servers trust.

use std::sync::Arc;

use anyhow::Context as _;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

use crate::config::CaFile;

/// Settings that trust the authorities in `ca` and, with `public`, those of the machine (found through `SSL_CERT_FILE` and
/// `SSL_CERT_DIR`), or Mozilla's if the machine has none.
///
/// # Errors
///
/// There is no authority to trust.
pub fn trusting(ca: Option<&CaFile>, public: bool) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    if public {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
    }
    if let Some(pem) = ca.map(CaFile::pem) {
        roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
    }
    anyhow::ensure!(!roots.is_empty(), "no certificate authority to trust");
    let provider = rustls::crypto::ring::default_provider();
    let tls = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .context("TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(tls)
}
