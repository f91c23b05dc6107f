//! Vsock ports on the command line.

use std::path::PathBuf;

use cubbyhole::VsockPort;

/// `PORT:PATH`. What is in the way of either is the builder's to say, with all other mistakes.
pub fn vsock(text: &str) -> Result<VsockPort, String> {
    let (port, path) = text.split_once(':').filter(|(_, path)| !path.is_empty()).ok_or(FORM)?;
    let port = port.parse().map_err(|_| FORM)?;
    Ok(VsockPort { port, path: PathBuf::from(path) })
}

const FORM: &str = "write PORT:PATH, a port of the host and a Unix socket: 5000:/run/service.sock";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_port_leads_to_a_path() {
        let expected = VsockPort { port: 5000, path: "/run/a:b.sock".into() };
        assert_eq!(vsock("5000:/run/a:b.sock"), Ok(expected));
        for wrong in ["", "5000", "5000:", ":/x", "-1:/x", "4294967296:/x", "x:/x"] {
            assert!(vsock(wrong).unwrap_err().contains("PORT:PATH"), "{wrong}");
        }
    }
}
