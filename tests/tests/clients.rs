//! The network as people use it: the clients that everybody has, in a guest, with real servers outside of it
//! ([`cubby_tests::internet`]). The policy is the default one, names come from the guest's resolver, and each test looks at
//! what has come and not only at whether something did.

use cubby_tests::internet::{Internet, WEB};
use cubby_tests::{name, shell, within};
use cubbyhole::Sandbox;
use tokio::sync::OnceCell;

/// The guest of all these tests. It trusts the certificate of `web.test`.
async fn guest() -> (Sandbox, &'static Internet) {
    static MADE: OnceCell<()> = OnceCell::const_new();
    let internet = Internet::get().await;
    let make = async || {
        let sandbox = within("create", internet.builder("clients").create()).await.unwrap();
        let certificate = internet.script("cat web.crt").await;
        sandbox.fs().append("/etc/ssl/certs/ca-certificates.crt", certificate).await.unwrap();
    };
    MADE.get_or_init(make).await;
    (Sandbox::get(&name("clients")).await.unwrap(), internet)
}

/// The SHA-256 of a file of the Internet.
async fn sha256(internet: &Internet, file: &str) -> String {
    internet.run(&["sha256sum", file], &[]).await[..64].to_owned()
}

#[tokio::test]
async fn curl_gets_and_sends_by_http_and_tls() {
    let (guest, internet) = guest().await;
    let data = sha256(internet, "www/data").await;
    let told = "%{http_version} %{num_connects} %{ssl_verify_result} %{size_download}\\n";
    let got = |url: &str| format!("curl -sS -w '{told}' -o got {url}; sha256sum < got");
    for (url, expected) in [
        ("--http1.1 http://web.test/data", "1.1"),
        ("--http1.1 https://web.test/data", "1.1"),
        ("--http2 https://web.test/data", "2"),
        ("-4 http://web.test/data", "1.1"),
        ("-6 http://web.test/data", "1.1"),
    ] {
        assert_eq!(shell(&guest, &got(url)).await, format!("{expected} 1 0 4194304\n{data}  -\n"), "{url}");
    }
    let _ = WEB;
}

#[tokio::test]
async fn dig_gets_every_kind_of_answer() {
    let (guest, _) = guest().await;
    let ask = async |question: &str| shell(&guest, &format!("dig +noall +answer +nottlid {question}")).await;
    println!("{}", ask("web.test").await);
    println!("{}", shell(&guest, "dig long.test TXT | tail -30").await);
}
