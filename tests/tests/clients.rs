//! The network as people use it: the clients that everybody has, in a guest, with real servers outside of it
//! ([`cubby_tests::internet`]). The policy is the default one, names come from the guest's resolver, and each test looks at
//! what has come and not only at whether something did.

use cubby_tests::internet::{Internet, PRIVATE, WEB};
use cubby_tests::{REPEATS, discard, name, python, shell, within};
use cubbyhole::Sandbox;
use serde_json::Value;
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
    let told = "%{http_version} %{ssl_verify_result} %{size_download} %{num_connects}\\n";
    for (how, expected) in [
        ("--http1.1 http://web.test/data", "1.1"),
        ("--http1.1 https://web.test/data", "1.1"),
        ("--http2 https://web.test/data", "2"),
        ("-6 http://web.test/data", "1.1"),
    ] {
        let got = shell(&guest, &format!("curl -sS -w '{told}' -o got {how}; sha256sum < got")).await;
        assert_eq!(got, format!("{expected} 0 1500000 1\n{data}  -\n"), "{how}");
    }
    // Every version of TLS that is still spoken, and no certificate that is another's.
    for (how, version) in [("", "TLSv1.3"), ("--tls-max 1.2", "TLSv1.2")] {
        let told = shell(&guest, &format!("curl -sSv {how} https://v6.test/page1 2>&1")).await;
        assert!(told.contains(&format!("SSL connection using {version} ")), "{told}");
        assert!(told.contains("page 1\n"), "{told}");
    }
    assert_eq!(shell(&guest, "curl -sS https://other.test/page1 > got 2> said; echo $?").await, "60\n");

    // What is sent comes whole, of known length and in chunks; two requests share a connection, twenty do not mix.
    shell(&guest, "curl -sS -o data http://web.test/data").await;
    for how in ["", "-H 'Transfer-Encoding: chunked'"] {
        let told = shell(&guest, &format!("curl -sS {how} -T data https://web.test/cgi/hash")).await;
        assert!(told.ends_with(&format!("{data}  -\n")), "{told}");
    }
    let twice = "curl -sS -w '%{num_connects}\\n' http://web.test/page[1-2]";
    assert_eq!(shell(&guest, twice).await, "page 1\n1\npage 2\n0\n");
    let range = internet.script("tail --bytes +1000001 www/data | head --bytes 5000 | sha256sum").await;
    assert_eq!(shell(&guest, "curl -sS -r 1000000-1004999 http://web.test/data | sha256sum").await, range);
    let twenty = "curl -sSZ --parallel-immediate --http1.1 -o 'page#1' 'http://web.test/page[1-20]'
                  for n in $(seq 20); do read -r page < page$n; [ \"$page\" = \"page $n\" ] || echo $n; done";
    assert_eq!(shell(&guest, twenty).await, "");
}

#[tokio::test]
async fn requests_keeps_its_connection_and_checks_certificates() {
    let (guest, internet) = guest().await;
    let data = sha256(internet, "www/data").await;
    let program = r#"
import hashlib, requests
session = requests.Session()
with session.get('https://web.test/data', stream=True, timeout=60) as answer:
    print(answer.status_code, answer.raw.version, answer.raw.connection.sock.version())
    whole = b''.join(answer.iter_content(10_000))
print(hashlib.sha256(whole).hexdigest())
ports = set()
for size in 0, 1, 70_000, len(whole):
    port, version, *got = session.post('https://web.test/cgi/hash', data=whole[:size], timeout=60).text.split()
    assert (version, got[0]) == ('HTTP/1.1', hashlib.sha256(whole[:size]).hexdigest()), size
    ports.add(port)
print(len(ports))
print(session.get('http://web.test/nowhere', timeout=60).status_code)
try: session.get('https://other.test/', timeout=60)
except requests.exceptions.SSLError as error: print("hostname 'other.test' doesn't match" in str(error))
"#;
    assert_eq!(python(&guest, program).await, format!("200 11 TLSv1.3\n{data}\n1\n404\nTrue\n"));
}

#[tokio::test]
async fn git_clones_and_pushes_over_http() {
    let (guest, internet) = guest().await;
    internet
        .script(
            "git init -q --bare --initial-branch=main git/project.git
             git -C git/project.git config http.receivepack true
             git init -q --initial-branch=main work; cd work
             git config user.name somebody; git config user.email somebody@web.test
             cp ../www/data ../www/page* .; git add .; git commit -q -m one
             git push -q ../git/project.git main",
        )
        .await;
    let commit = internet.script("git -C work rev-parse HEAD").await;
    let data = sha256(internet, "www/data").await;
    let clone = "set -e; rm -rf project; git clone -q https://web.test/git/project.git; cd project; git rev-parse HEAD
                 git fsck --strict 2> /tmp/fsck; sha256sum < data; ls | wc -l";
    assert_eq!(shell(&guest, clone).await, format!("{commit}{data}  -\n21\n"));
    // A push sends more than git puts into one request of known length.
    let push = "set -e; cd project; head -c 1500000 /dev/urandom > more; git add more
                git -c user.name=guest -c user.email=guest@web.test commit -q -m two
                git push -q http://web.test/git/project.git main; git rev-parse HEAD; sha256sum < more";
    let pushed = shell(&guest, push).await;
    let there =
        "cd git/project.git; git fsck --strict 2> fsck; git rev-parse main; git show main:more | sha256sum";
    assert_eq!(internet.script(there).await, pushed);
    let gone = "git clone -q http://web.test/git/nothing.git 2>&1; echo $?";
    let told = shell(&guest, gone).await;
    assert!(told.contains("not found") && told.ends_with("128\n"), "{told}");
}

#[tokio::test]
async fn pip_installs_from_an_index() {
    let (guest, internet) = guest().await;
    // A wheel (PEP 427), and an index of it (PEP 503) with its hash.
    let make = r#"
import hashlib, os, zipfile
info = 'cubby_probe-1.2.dist-info/'
files = {
    'cubby_probe.py': b'DATA = ' + repr(open('www/data', 'rb').read(200_000)).encode(),
    info + 'METADATA': b'Metadata-Version: 2.1\nName: cubby-probe\nVersion: 1.2\n',
    info + 'WHEEL': b'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
}
record = ''.join(f'{name},,\n' for name in [*files, info + 'RECORD'])
os.makedirs('www/simple/cubby-probe')
wheel = 'cubby_probe-1.2-py3-none-any.whl'
with zipfile.ZipFile(f'www/simple/cubby-probe/{wheel}', 'w') as archive:
    for name, content in {**files, info + 'RECORD': record.encode()}.items():
        archive.writestr(name, content)
digest = hashlib.sha256(open(f'www/simple/cubby-probe/{wheel}', 'rb').read()).hexdigest()
with open('www/simple/cubby-probe/index.html', 'w') as index:
    index.write(f'<!DOCTYPE html><a href="{wheel}#sha256={digest}">{wheel}</a>')
# Another index has the same file, under the hash of another one.
os.makedirs('www/wrong/cubby-probe')
with open('www/wrong/cubby-probe/index.html', 'w') as index:
    index.write(f'<!DOCTYPE html><a href="/simple/cubby-probe/{wheel}#sha256={digest[::-1]}">{wheel}</a>')
print(hashlib.sha256(files['cubby_probe.py']).hexdigest())
"#;
    let module = internet.run(&["python3", "-c", make], &[]).await;
    let pip = "pip install -q --no-cache-dir --no-compile --disable-pip-version-check --root-user-action=ignore \
               --break-system-packages cubby-probe --index-url https://web.test";
    let told = shell(&guest, &format!("{pip}/wrong/ 2>&1; echo $?")).await;
    assert!(told.contains("DO NOT MATCH THE HASHES") && told.ends_with("\n1\n"), "{told}");
    let found = "import importlib.util; print(importlib.util.find_spec('cubby_probe'))";
    assert_eq!(python(&guest, found).await, "None\n");
    shell(&guest, &format!("{pip}/simple/")).await;
    let installed = "
import cubby_probe, hashlib, importlib.metadata
print(hashlib.sha256(open(cubby_probe.__file__, 'rb').read()).hexdigest())
print(importlib.metadata.version('cubby-probe'))";
    assert_eq!(python(&guest, installed).await, format!("{module}1.2\n"));
}

#[tokio::test]
async fn apt_installs_from_a_mirror() {
    let (guest, internet) = guest().await;
    internet
        .script(
            "mkdir -p package/DEBIAN package/opt www/debian; cp www/data package/opt/probe
             printf '%s\\n' 'Package: cubby-probe' 'Version: 3-1' 'Architecture: all' \
                 'Maintainer: somebody <somebody@web.test>' 'Description: a probe' > package/DEBIAN/control
             dpkg-deb --build -Znone --root-owner-group package www/debian/probe.deb > build.log
             cd www/debian
             { dpkg-deb --field probe.deb; echo 'Filename: ./probe.deb'; echo \"Size: $(stat -c %s probe.deb)\"
               echo \"SHA256: $(sha256sum probe.deb | cut -c 1-64)\"; } > Packages
             { echo 'Suite: stable'; echo \"Date: $(date -Ru)\"; echo SHA256:
               echo \" $(sha256sum Packages | cut -c 1-64) $(stat -c %s Packages) Packages\"; } > Release
             # One with another package, and one with another list, each of the same length.
             cp -r . ../other-package; cp -r . ../other-list
             printf X | dd of=../other-package/probe.deb bs=1 seek=1000000 conv=notrunc status=none
             sed -i s/3-1/3-2/ ../other-list/Packages",
        )
        .await;
    let data = sha256(internet, "www/data").await;
    // What nobody has signed, what is not what was signed, and a package that is not what is listed: apt takes none.
    shell(&guest, "rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*").await;
    for (source, why) in [
        ("deb http://web.test/debian ./", "is not signed"),
        ("deb [trusted=yes] http://web.test/other-list ./", "Hash Sum mismatch"),
        ("deb [trusted=yes] http://web.test/other-package ./", "Hash Sum mismatch"),
    ] {
        let install = format!(
            "echo '{source}' > /etc/apt/sources.list
             {{ apt-get -qq update && apt-get -qq install cubby-probe; }} 2>&1; echo $?"
        );
        let told = shell(&guest, &install).await;
        assert!(told.contains(why) && told.ends_with("\n100\n"), "{source}: {told}");
        assert_eq!(shell(&guest, "ls /opt").await, "", "{source}");
    }
    let install = "set -e; echo 'deb [trusted=yes] http://web.test/debian ./' > /etc/apt/sources.list
                   apt-get -qq update; apt-get -qq install cubby-probe > said 2>&1 || cat said >&2
                   dpkg-query --show --showformat '${Version} ${Status}\\n' cubby-probe; sha256sum < /opt/probe";
    assert_eq!(shell(&guest, install).await, format!("3-1 install ok installed\n{data}  -\n"));
}

#[tokio::test]
async fn ssh_runs_commands_and_copies_files() {
    let (guest, internet) = guest().await;
    let key = "set -e; mkdir -p -m 700 ~/.ssh; ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519; cat ~/.ssh/*.pub";
    let key = shell(&guest, key).await;
    internet
        .run(&["sh", "-c", "cat > authorized; ssh-keygen -q -t ed25519 -N '' -f hostkey"], key.as_bytes())
        .await;
    let sshd = "/usr/sbin/sshd -D -e -f /dev/null -o HostKey=/srv/hostkey -o AuthorizedKeysFile=/srv/authorized \
                -o StrictModes=no -o PidFile=none -o Subsystem='sftp internal-sftp'";
    let mut server = internet.serve(&["sh", "-c", &format!("exec {sshd}")], 22).await;
    let host_key = internet.script("cut -d ' ' -f 1,2 hostkey.pub").await;
    shell(&guest, &format!("echo 'web.test {}' > ~/.ssh/known_hosts", host_key.trim())).await;

    let data = sha256(internet, "www/data").await;
    let ssh = "ssh -o BatchMode=yes -o CheckHostIP=no somebody@web.test";
    let told = shell(&guest, &format!("{ssh} 'echo $SSH_CLIENT; id -un; exit 7'; echo $?")).await;
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines[1..], ["somebody", "7"], "{told} {}", server.said());
    // Both ways at once, through one pipe, and files over SFTP.
    let through = format!("curl -sS http://web.test/data | {ssh} cat | sha256sum");
    assert_eq!(shell(&guest, &through).await, format!("{data}  -\n"));
    let copied = "set -e; scp -q -o BatchMode=yes -o CheckHostIP=no somebody@web.test:www/data copied
                  scp -q -o BatchMode=yes -o CheckHostIP=no copied somebody@web.test:/srv/copied-back; sha256sum < copied";
    assert_eq!(shell(&guest, copied).await, format!("{data}  -\n"));
    assert_eq!(sha256(internet, "copied-back").await, data);
    // A key that is another's ends it before anything is said.
    shell(&guest, "rm ~/.ssh/known_hosts").await;
    let told = shell(&guest, &format!("{ssh} true 2>&1; echo $?")).await;
    assert!(told.contains("Host key verification failed") && told.ends_with("255\n"), "{told}");
}

#[tokio::test]
async fn psql_and_pgbench_work_on_a_server_of_postgresql() {
    let (guest, internet) = guest().await;
    internet
        .script(
            "initdb --pgdata=postgres --username=somebody --auth=trust --locale=C --encoding=UTF8 --no-sync \
                 --no-instructions --wal-segsize=1 > initdb.log
             echo 'host all somebody all trust' > postgres/pg_hba.conf
             cp web.crt key postgres; chmod 600 postgres/key",
        )
        .await;
    let server = [
        &["postgres", "-D", "/srv/postgres"][..],
        &["-c", "listen_addresses=*", "-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "jit=off"],
        &["-c", "dynamic_shared_memory_type=mmap", "-c", "ssl=on"],
        &["-c", "ssl_cert_file=web.crt", "-c", "ssl_key_file=key"],
    ]
    .concat();
    let _server = internet.serve(&server, 5432).await;
    let sql = async |sql: &str| {
        let psql = "psql 'host=web.test user=somebody dbname=postgres sslmode=verify-full \
                    sslrootcert=/etc/ssl/certs/ca-certificates.crt' -XAtq -v ON_ERROR_STOP=1";
        shell(&guest, &format!("export PATH=/usr/lib/postgresql/15/bin:$PATH; {psql} <<'END'\n{sql}\nEND"))
            .await
    };
    // Rows both ways: 20,000 that the client sends, and what comes back of them.
    let rows = "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid();
                CREATE TABLE rows (n int, t text);
                \\copy rows FROM PROGRAM 'seq 20000 | sed \"s/.*/&\\tline &/\"'
                SELECT count(*), sum(n), count(DISTINCT t) FROM rows;
                \\copy rows TO 'rows'
                \\! wc -l < rows";
    assert_eq!(sql(rows).await, "t|TLSv1.3\n20000|200010000|20000\n20000\n");
    let bench = "export PATH=/usr/lib/postgresql/15/bin:$PATH PGHOST=web.test PGUSER=somebody PGDATABASE=postgres; set -e
                 pgbench -q -i -n -s 1 2> said; pgbench -n -c 4 -t 15 2> said";
    let told = shell(&guest, bench).await;
    assert!(told.contains("number of transactions actually processed: 60/60\n"), "{told}");
    assert!(told.contains("number of failed transactions: 0 (0.000%)\n"), "{told}");
    let sums = "SELECT count(*) FROM pgbench_accounts; SELECT count(*) FROM pgbench_history;
                SELECT (SELECT sum(abalance) FROM pgbench_accounts) = sum(delta)
                   AND (SELECT sum(bbalance) FROM pgbench_branches) = sum(delta)
                   AND (SELECT sum(tbalance) FROM pgbench_tellers) = sum(delta) FROM pgbench_history;";
    assert_eq!(sql(sums).await, "100000\n60\nt\n");
    let told =
        shell(&guest, "/usr/lib/postgresql/15/bin/psql -h web.test -U nobody postgres 2>&1; echo $?").await;
    assert!(told.contains("no pg_hba.conf entry for host") && told.ends_with("2\n"), "{told}");
}

#[tokio::test]
async fn redis_benchmark_has_every_call_answered() {
    let (guest, internet) = guest().await;
    // The server is the program of this name, under its other one.
    internet.script("ln -s /usr/bin/redis-check-rdb redis-server").await;
    let server = ["./redis-server", "--port", "6379", "--bind", "*", "--protected-mode", "no", "--save", ""];
    let _server = internet.serve(&server, 6379).await;
    // Whole bundles: the client fills the last one.
    let bench = "redis-benchmark -h web.test -n 1600 -c 50 -d 1000 -t set,get --csv
                 redis-benchmark -h web.test -n 1600 -c 10 -P 16 -t incr,lpush --csv";
    let told = shell(&guest, bench).await;
    let done: Vec<&str> =
        told.lines().filter_map(|line| line.split('"').nth(1)).filter(|it| *it != "test").collect();
    assert_eq!(done, ["SET", "GET", "INCR", "LPUSH"], "{told}");
    let told =
        shell(&guest, "redis-cli -h web.test info commandstats; redis-cli -h web.test llen mylist").await;
    for call in ["set", "get", "incr", "lpush"] {
        let line = told.lines().find(|line| line.starts_with(&format!("cmdstat_{call}:")));
        let line = line.unwrap_or_else(|| panic!("{told}"));
        assert!(line.contains(":calls=1600,") && line.contains("failed_calls=0"), "{line}");
    }
    assert!(told.ends_with("\n1600\n"), "{told}");
    // A value of a megabyte, there and back.
    let value =
        "curl -sS -r 0-999999 http://web.test/data > value; redis-cli -h web.test -x set value < value
                 redis-cli -h web.test get value | head -c 1000000 | cmp - value && echo same";
    assert_eq!(shell(&guest, value).await, "OK\nsame\n");
}

#[tokio::test]
async fn iperf3_loses_nothing_in_either_direction() {
    let (guest, internet) = guest().await;
    let _server = internet.serve(&["iperf3", "--server"], 5201).await;
    for (host, how, udp) in [
        (WEB[0], "", false),
        (WEB[0], "--reverse", false),
        (WEB[1], "", false),
        (WEB[0], "--udp", true),
        (WEB[0], "--udp --reverse", true),
        (WEB[1], "--udp", true),
    ] {
        let test = format!("iperf3 --json --client {host} --bitrate 4M --length 1200 --bytes 500K {how}");
        let told = shell(&guest, &test).await;
        let told: Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
        let number = |path: &str| told.pointer(path).and_then(Value::as_u64);
        let number = |path| number(path).unwrap_or_else(|| panic!("{test}: no {path}: {told}"));
        if udp {
            // Whoever receives counts what is missing, and what is not in its order. Some are sent until the end is agreed.
            assert!(number("/end/sum/packets") >= 427, "{test}: {told}");
            assert_eq!(number("/end/sum/lost_packets"), 0, "{test}: {told}");
            assert_eq!(number("/end/streams/0/udp/out_of_order"), 0, "{test}: {told}");
        } else {
            // The client decides when it is enough: what it has received, or given to its kernel. Of the latter the server
            // counts what it has read by the time that it hears of the end, on another connection, which it asks
            // first; at this rate 100,000 bytes are a fifth of a second. Every byte's own way is `curl`'s to tell.
            let received = number("/end/sum_received/bytes");
            assert!(number("/end/sum_sent/bytes") >= 512_000, "{test}: {told}");
            assert!(received >= if how.is_empty() { 400_000 } else { 512_000 }, "{test}: {told}");
            assert_eq!(number("/end/sum_sent/retransmits"), 0, "{test}: {told}");
        }
    }
}

#[tokio::test]
async fn dig_gets_every_kind_of_answer() {
    let (guest, _) = guest().await;
    let long = format!("\"{}\"", (1000..2000).map(|n| n.to_string()).collect::<Vec<_>>().join("\" \""));
    let asked = [
        ("web.test", WEB[0]),
        ("web.test AAAA", WEB[1]),
        ("WeB.tEsT A +tcp", WEB[0]),
        ("web.test A +noedns", WEB[0]),
        ("alias.test AAAA", &format!("web.test.\n{}", WEB[1])),
        ("web.test MX", "10 mail.test."),
        ("_http._tcp.web.test SRV", "5 7 80 web.test."),
        ("-x 93.184.215.14", "web.test."),
        ("short.test TXT", "\"one\" \"two\""),
        ("long.test TXT", &long),
        ("v4.test AAAA", ""),
        ("host.cubbyhole.internal", "198.18.0.254"),
    ];
    let script = asked.map(|(question, _)| format!("dig +short {question}; echo --")).join("\n");
    let told = shell(&guest, &script).await;
    let answers: Vec<&str> = told.split("--\n").map(str::trim_end).collect();
    assert_eq!(answers[..asked.len()], asked.map(|(_, answer)| answer));
    let status = shell(&guest, "dig nothing.test | grep -o 'status: [A-Z]*'").await;
    assert_eq!(status, "status: NXDOMAIN\n");
    // What does not fit into a datagram is asked for again by TCP.
    let told = shell(&guest, "dig long.test TXT | grep -e Truncated -e SERVER").await;
    assert_eq!(told, ";; Truncated, retrying in TCP mode.\n;; SERVER: 198.18.0.1#53(198.18.0.1) (TCP)\n");
}

#[tokio::test]
async fn ping_is_answered() {
    let (guest, _) = guest().await;
    for host in ["-4 web.test", "-6 web.test", "198.18.0.1", "-s 1400 v4.test"] {
        let told = shell(&guest, &format!("ping -n -i 0.05 -c 5 -w 60 {host}")).await;
        assert!(told.contains("5 packets transmitted, 5 received, 0% packet loss"), "{host}: {told}");
    }
}

#[tokio::test]
async fn what_is_denied_is_refused_at_once_as_the_client_says() {
    let internet = Internet::get().await;
    // Somebody is there, who would answer those that may come.
    for address in PRIVATE.iter().filter(|address| !address.contains(':')) {
        assert_eq!(internet.script(&format!("curl -sS http://{address}/page1")).await, "page 1\n");
    }
    // Nothing else happens in this guest, whose kernel counts what it had to send again.
    let guest = within("create", internet.builder("refused").create()).await.unwrap();
    let timed = async |command: String| {
        let program = format!(
            "{REPEATS}
import json, subprocess, time
before, begin = repeats(), time.monotonic()
ended = subprocess.run(['sh', '-c', {command:?}], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
print(json.dumps([ended.stdout, str(ended.returncode), time.monotonic() - begin, before, repeats()]))"
        );
        let told: (String, String, f64, [u64; 2], [u64; 2]) =
            serde_json::from_str(&python(&guest, &program).await).unwrap();
        let (said, code, took, before, after) = told;
        assert_eq!(after, before, "{command} asked again: {said}");
        // Of UDP and ICMP nobody counts it; the machine may take hundreds of milliseconds to start a program.
        assert!(took < 5.0, "{command} took {took} s: {said}");
        (said, code)
    };
    for address in PRIVATE {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let (said, code) = timed(format!("curl -sSv --connect-timeout 60 http://{host}/page1")).await;
        assert!(code == "7" && said.contains("Connection refused"), "{address}: {code} {said}");
    }
    let (said, code) = timed("ssh -o BatchMode=yes -o ConnectTimeout=60 10.1.2.3".into()).await;
    assert!(code == "255" && said.contains("port 22: Connection refused"), "{said}");
    let (said, code) = timed("git clone -q http://192.168.1.1/git/project.git denied".into()).await;
    assert!(code == "128" && said.contains("Failed to connect to 192.168.1.1 port 80"), "{said}");
    let (said, code) = timed("redis-cli -h 10.1.2.3 ping".into()).await;
    assert!(code == "1" && said.contains("Connection refused"), "{said}");
    let (said, code) = timed("ping -n -c 1 -w 60 10.1.2.3".into()).await;
    assert!(code == "1" && said.contains("Packet filtered"), "{said}");
    let (said, code) = timed("dig +tries=1 +time=60 @10.1.2.3 web.test".into()).await;
    assert!(code == "9" && said.contains("host unreachable"), "{said}");
    // Nobody listens: the same, from who is not there.
    let (said, code) = timed("curl -sSv --connect-timeout 60 http://web.test:81/".into()).await;
    assert!(code == "7" && said.contains("Connection refused"), "{said}");
    let (said, code) = timed("curl -sS --connect-timeout 60 http://nothing.test/".into()).await;
    assert!(code == "6" && said.contains("Could not resolve host"), "{said}");
    discard(guest).await;
}
