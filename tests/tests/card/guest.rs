//! A guest of the VMM alone, without a sandbox around it: the agent as its first process, the test image as its root, and
//! Python scripts as its commands.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Instant, SystemTime};

use cubby_protocol::message::{GuestConfig, Open, RootDisks, SetupFailed};
use cubby_protocol::{AGENT_PORT, CONTROL_PORT, Decoder, Hello, Kind, SessionId, decode, encode};
use cubby_tests::{BOUND, image, store, variable};
use cubby_vmm::devices::vsock::{Port, StreamId, Vsock, VsockEvent};
use cubby_vmm::{Disk, DiskCache, EventLoop, Initramfs, Network, Vm, VmConfig};
use serde::Serialize;

pub struct Guest {
    pub vm: Vm,
    events: EventLoop,
    vsock: Arc<Mutex<Vsock>>,
    deadline: Instant,
}

/// A stream to the agent, and what has come on it.
struct Stream {
    id: StreamId,
    decoder: Decoder,
}

impl Guest {
    /// A guest that is ready, or how its agent has failed.
    pub async fn boot(
        network: Network,
        config: cubby_protocol::message::Network,
    ) -> Result<Self, SetupFailed> {
        let images = cubby_image::Store::open(store().home().images()).unwrap();
        let options = cubby_image::PullOptions::default();
        let policy = cubby_image::PullPolicy::IfMissing;
        let image = images.resolve(&image().parse().unwrap(), policy, &options).await.unwrap();
        let assets = std::path::PathBuf::from(variable("CUBBY_ASSETS"));
        let file = std::fs::File::open(&image.disk).unwrap();
        let disk = Disk { file, read_only: true, serial: String::new(), cache: DiskCache::Writeback };
        let vm = VmConfig {
            vcpus: 1,
            memory_mib: 256,
            kernel: assets.join("vmlinux"),
            initramfs: Some(Initramfs::with_init(&assets.join("cubby-agent")).unwrap()),
            cmdline: "console=ttyS0 quiet reboot=k panic=-1 random.trust_cpu=on no_timer_check rdinit=/init"
                .into(),
            disks: vec![disk],
            vsock_cid: Some(3),
            network: Some(network),
            console: None,
            marks: None,
            on_thread: None,
        };
        let mut events = Vm::event_loop().unwrap();
        let vm = Vm::boot(vm, &mut events).unwrap();
        let vsock = vm.vsock().unwrap().clone();
        let mut guest = Self { vm, events, vsock, deadline: Instant::now() + BOUND };
        guest.vsock().listen(Port(CONTROL_PORT));
        guest.vm.resume();
        let control = loop {
            match guest.event() {
                VsockEvent::Accepted { id, .. } => break id,
                other => assert!(matches!(other, VsockEvent::Again), "{other:?}"),
            }
        };
        let mut control = Stream { id: control, decoder: Decoder::default() };
        let realtime = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let config = GuestConfig {
            hostname: "card".into(),
            realtime_ns: u64::try_from(realtime).unwrap(),
            root: RootDisks { image: "/dev/vda".into(), disk: None },
            network: Some(config),
            ..GuestConfig::default()
        };
        guest.say(&control, SessionId::CONNECTION, Kind::Configure, &config, true);
        match guest.frame(&mut control, |kind| kind != Kind::Hello) {
            (Kind::Ready, _) => Ok(guest),
            (Kind::SetupFailed, payload) => Err(decode(&payload).unwrap()),
            (kind, _) => panic!("{kind:?}"),
        }
    }

    /// Runs a script with Python and returns what it printed. It has to succeed.
    pub fn python(&mut self, script: &str) -> String {
        self.deadline = Instant::now() + BOUND;
        let id = self.vsock().connect(Port(AGENT_PORT)).unwrap();
        let mut stream = Stream { id, decoder: Decoder::default() };
        let open = Open {
            program: "sh".into(),
            args: vec!["-c".into(), "exec 2>&1; exec python3 -c \"$0\"".into(), script.into()],
            ..Open::default()
        };
        self.say(&stream, SessionId(1), Kind::Open, &open, true);
        let mut output = Vec::new();
        loop {
            match self.frame(&mut stream, |kind| !matches!(kind, Kind::Hello | Kind::Started)) {
                (Kind::Stdout, bytes) => output.extend(bytes),
                (Kind::Exited, payload) => {
                    let output = String::from_utf8(output).unwrap();
                    assert_eq!(payload, [0, 0], "{output}");
                    self.vsock().reset(id);
                    return output;
                }
                (kind, payload) => panic!("{kind:?} {payload:?}"),
            }
        }
    }

    fn vsock(&self) -> MutexGuard<'_, Vsock> {
        self.vsock.lock().unwrap()
    }

    fn say(&self, stream: &Stream, session: SessionId, kind: Kind, message: &impl Serialize, first: bool) {
        let mut bytes = if first { Hello::OURS.to_frame().to_vec() } else { Vec::new() };
        encode(kind, session, message, &mut bytes).unwrap();
        assert_eq!(self.vsock().send(stream.id, &bytes), bytes.len());
    }

    /// The next thing that happens on the vsock.
    fn event(&mut self) -> VsockEvent {
        loop {
            let event = self.vsock().poll_event();
            if let Some(event) = event {
                return event;
            }
            self.events.run_with_timeout(100).unwrap();
            let console = || String::from_utf8_lossy(&self.vm.console_tail()).into_owned();
            assert_eq!(self.vm.exit(), None, "{}", console());
            assert!(Instant::now() < self.deadline, "{}", console());
        }
    }

    /// The next frame that is wanted.
    fn frame(&mut self, stream: &mut Stream, wanted: impl Fn(Kind) -> bool) -> (Kind, Vec<u8>) {
        loop {
            if let Some(frame) = stream.decoder.next_frame().unwrap() {
                if wanted(frame.header.kind) {
                    return (frame.header.kind, frame.payload().to_vec());
                }
                continue;
            }
            let bytes = self.vsock().received(stream.id).to_vec();
            stream.decoder.push(&bytes);
            self.vsock().consume(stream.id, bytes.len());
            if bytes.is_empty() {
                let event = self.event();
                assert!(!matches!(event, VsockEvent::Closed(id, _) if id == stream.id), "{event:?}");
            }
        }
    }
}
