//! Commits: the system disk of a VM, as it is at a moment, becomes an image of the repository.
//!
//! ```text
//! controller                         agent
//!   command `snapshot` (DDS)  ----->   freezes the guest, if it can; snapshot of all volumes
//!   <----- verdict: which volume is the system disk
//!   GET manifest (stream endpoint) ->  names the chunks
//!   <----- manifest
//!   POST the digests it lacks  ---->   those chunks
//!   <----- bytes, each compared with its name
//! ```
//! The snapshot goes by itself when nobody reads of it any more: no command travels over the stream endpoint, and one that is
//! broken off leaves nothing behind for good.

use std::{
    collections::{BTreeMap, HashSet},
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use muster_api::{BootFiles, CommandState, CommitImage, ImageFormat, Outcome};
use muster_common::{ByteLen, CommandId, Digest, ErrorCode, VmId};
use muster_idl::{
    arguments::{SnapshotResult, name},
    v1::{TargetKind, Verb},
};
use muster_repository::{CHUNK_SIZE, Manifest, Repository, Session, estimate::Estimator};

use crate::{
    core::{Core, Handle, NewCommand},
    db::{DesiredVm, Standing, StoredImage},
    import::{forget_unknown, record, reference_of},
    jobs::Work,
    refusal::Refusal,
    rest::{agents_refusal, unreachable_agent},
};

/// How long the host keeps the snapshot after somebody last read of it: longer than any pause of ours.
const KEEP_SECONDS: u32 = 300;
/// Chunks asked for at once, and requests on the way: as an agent pulls an image.
const BATCH: usize = 64;
const IN_FLIGHT: usize = 3;
/// The agent reads and hashes the whole volume before it answers: 2 TiB at 2 GB/s.
const NAMING: Duration = Duration::from_secs(1200);
/// For 4 MiB.
const FETCHING: Duration = Duration::from_secs(120);
/// That of a volume of 2 TiB without holes is 1 GiB; the agents' own limit.
const MANIFEST_LIMIT: usize = 256 << 20;

/// The way to a VM's volumes.
struct Origin {
    vm: VmId,
    vm_name: String,
    host_name: String,
    endpoint: String,
    boot: BootFiles,
    snapshot: String,
    command: CommandId,
}

impl Core {
    /// The VM of a commit and its host's stream endpoint, when nothing known stands against it.
    pub(crate) fn can_commit(&self, commit: &CommitImage) -> Result<(DesiredVm, String), Refusal> {
        self.free_revision(&commit.name, commit.new_revision)?;
        let (vm, endpoint) = self.stream_of(&commit.vm)?;
        match self.desired.get(&vm) {
            Some(desired) if desired.standing == Standing::Present => Ok((desired.clone(), endpoint)),
            _ => {
                let detail = format!("VM {} was not made from a template here, or is being made or deleted", commit.vm);
                Err(Refusal::new(ErrorCode::InvalidState, detail))
            }
        }
    }

    /// Orders the snapshot that an image is to be made of.
    fn begin_commit(&mut self, commit: &CommitImage, issuer: String) -> Result<Origin, Refusal> {
        let (desired, endpoint) = self.can_commit(commit)?;
        let vm = desired.id;
        let snapshot = format!("commit-{}", uuid::Uuid::new_v4().simple());
        let command = self.begin(NewCommand {
            verb: Verb::Snapshot,
            kind: TargetKind::Vm,
            target: desired.name.clone(),
            members: vec![(desired.host, Some(vm), desired.name.clone())],
            arguments: BTreeMap::from([
                (name::NAME.to_string(), snapshot.clone()),
                (name::KEEP_SECONDS.to_string(), KEEP_SECONDS.to_string()),
            ]),
            timeout_seconds: commit.timeout_seconds,
            issuer,
            retry_of: None,
        })?;
        let boot = &desired.spec.boot;
        let file = |text: &Option<String>| text.as_ref().and_then(|text| text.parse().ok());
        Ok(Origin {
            vm,
            vm_name: desired.name,
            host_name: self.inventory.host_name(desired.host),
            endpoint,
            boot: BootFiles { kernel: file(&boot.kernel), initrd: file(&boot.initrd), cmdline: boot.cmdline.clone() },
            snapshot,
            command,
        })
    }
}

/// What a commit needs of the controller.
pub struct Tools {
    pub core: Handle,
    pub repository: Repository,
    pub agents: reqwest::Client,
    pub now_us: u64,
}

/// Runs a commit to its end. A failed one leaves nothing that anything refers to.
pub async fn run(commit: CommitImage, issuer: String, tools: Tools, work: Work) {
    let asked = commit.clone();
    let result = match tools.core.call(move |core| core.begin_commit(&asked, issuer)).await {
        Ok(origin) => bring_in(&commit, &origin, &tools, &work).await,
        Err(refusal) => Err(refusal),
    };
    let result = match result {
        Ok(image) => record(image, commit.new_revision, &tools.repository, &tools.core).await,
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = &result {
        tracing::warn!(vm = commit.vm, code = %refusal.code, err = %refusal.detail, "commit failed");
    }
    work.end(result);
}

async fn bring_in(commit: &CommitImage, origin: &Origin, tools: &Tools, work: &Work) -> Result<StoredImage, Refusal> {
    work.progress("snapshot", 0, 0);
    let snapshot = snapshot_taken(&tools.core, origin.command).await?;
    let system = snapshot.volumes.iter().find(|volume| volume.role == "system").ok_or_else(|| {
        Refusal::new(ErrorCode::NotFound, format!("VM {} has no system disk in its snapshot", origin.vm_name))
    })?;
    let base = format!("{}/bulk/v1/vms/{}/snapshots/{}/{}", origin.endpoint, origin.vm, origin.snapshot, system.volume);
    work.progress("naming", 0, 0);
    let answer = tools.agents.get(format!("{base}/manifest")).timeout(NAMING).send().await;
    let bytes = body(answer, MANIFEST_LIMIT, origin).await?;
    let manifest = Manifest::parse(&bytes).map_err(|error| {
        let detail = format!("host {} sent no manifest: {error}", origin.host_name);
        Refusal::new(ErrorCode::Corrupt, detail)
    })?;
    let digest = manifest.digest();
    if let Some(same) = tools.core.call(move |core| Ok(core.images.get(&digest).map(StoredImage::full_name))).await? {
        let detail = format!("the same content is there already, as image {same}: use that one");
        return Err(Refusal::new(ErrorCode::AlreadyExists, detail));
    }
    let size = manifest.size();
    let (session, new_bytes) = copy(&manifest, &base, origin, tools, work).await?;

    work.progress("storing", size.0, size.0);
    let (repository, boot) = (tools.repository.clone(), origin.boot.clone());
    blocking(move || {
        let mut session = session;
        session.put_manifest(&bytes)?;
        for file in [boot.kernel, boot.initrd].into_iter().flatten() {
            session.put_blob(&repository.blob(&file)?)?;
        }
        Ok(session.publish(&reference_of(&digest), &[])?)
    })
    .await?;
    let (repository, manifest) = (tools.repository.clone(), Arc::new(manifest));
    work.progress("estimating", 0, size.0);
    let estimated = blocking(move || {
        let reader = repository.reader(manifest);
        Ok(Estimator::new().add(&reader, &mut |_| ControlFlow::Continue(()))?.resident)
    })
    .await;
    let resident = match estimated {
        Ok(resident) => resident,
        Err(refusal) => {
            forget_unknown(tools.repository.clone(), &tools.core, digest).await;
            return Err(refusal);
        }
    };
    Ok(StoredImage {
        digest,
        name: commit.name.clone(),
        revision: 0,
        // a volume is raw, whatever a guest writes into it
        format: ImageFormat::Raw,
        logical_bytes: size.0,
        new_bytes: new_bytes.0,
        resident_estimate_bytes: resident.0,
        boot: origin.boot.clone(),
        imported_at_us: tools.now_us,
        version: 1,
        parent: system.image.parse().ok(),
        origin: format!("VM {} on {}", origin.vm_name, origin.host_name),
    })
}

/// Waits for the command to end; what its one member says of the snapshot.
async fn snapshot_taken(core: &Handle, id: CommandId) -> Result<SnapshotResult, Refusal> {
    let mut changes = core.commands();
    let command = loop {
        changes.mark_unchanged();
        let command = core.call(move |core| core.command_view(id)).await?;
        if command.summary.state == CommandState::Ended {
            break command;
        }
        if changes.changed().await.is_err() {
            return Err(Refusal::new(ErrorCode::Unavailable, "the controller is shutting down"));
        }
    };
    let verdict = command.members.into_iter().find_map(|member| member.verdict);
    let Some(verdict) = verdict else {
        return Err(Refusal::new(ErrorCode::Internal, format!("the snapshot ended without a verdict (command {id})")));
    };
    if verdict.outcome != Outcome::Done {
        let code = ErrorCode::from_text(&verdict.code).unwrap_or(ErrorCode::Indeterminate);
        let detail = format!("no snapshot was taken ({}): {} (command {id})", verdict.outcome, verdict.message);
        return Err(Refusal::new(code, detail));
    }
    serde_json::from_value(verdict.result).map_err(|_| {
        let detail = "the agent does not say what it took a snapshot of: bring it to this version".to_string();
        Refusal::new(ErrorCode::Unsupported, detail)
    })
}

/// Fetches what the repository lacks. The session holds all chunks of the manifest then.
async fn copy(
    manifest: &Manifest,
    base: &str,
    origin: &Origin,
    tools: &Tools,
    work: &Work,
) -> Result<(Session, ByteLen), Refusal> {
    let mut seen = HashSet::new();
    let chunks: Vec<(Digest, u64)> =
        manifest.chunks().filter(|c| seen.insert(c.digest)).map(|c| (c.digest, c.len as u64)).collect();
    let repository = tools.repository.clone();
    let (session, missing) = blocking(move || {
        let session = repository.session();
        let missing: Vec<(Digest, u64)> = chunks.into_iter().filter(|(digest, _)| !session.holds(digest)).collect();
        Ok((session, missing))
    })
    .await?;
    let total: u64 = missing.iter().map(|(_, len)| len).sum();
    work.progress("copying", 0, total);

    let (send, mut receive) = tokio::sync::mpsc::channel::<(Vec<Digest>, Bytes)>(1);
    let host_name = origin.host_name.clone();
    let storing = tokio::task::spawn_blocking(move || {
        let (mut session, mut new_bytes) = (session, ByteLen::ZERO);
        while let Some((batch, answer)) = receive.blocking_recv() {
            new_bytes.0 += store(&mut session, &batch, &answer, &host_name)?;
        }
        Ok::<_, Refusal>((session, new_bytes))
    });
    let batches = missing.chunks(BATCH).map(<[(Digest, u64)]>::to_vec);
    let mut fetched = stream::iter(batches)
        .map(|batch| async move {
            let digests: Vec<Digest> = batch.iter().map(|(digest, _)| *digest).collect();
            let wanted: Vec<u8> = digests.iter().flat_map(|digest| *digest.as_bytes()).collect();
            let request = tools.agents.post(format!("{base}/chunks")).body(wanted).timeout(FETCHING);
            let bytes = body(request.send().await, digests.len() * (CHUNK_SIZE + 4), origin).await?;
            Ok::<_, Refusal>((digests, bytes, batch.iter().map(|(_, len)| len).sum::<u64>()))
        })
        .buffered(IN_FLIGHT);
    let mut done = 0;
    let mut failed = None;
    while let Some(batch) = fetched.next().await {
        match batch {
            Ok((digests, bytes, len)) => {
                // closed: storing failed, its own error is said below
                if send.send((digests, bytes)).await.is_err() {
                    break;
                }
                done += len;
                work.progress("copying", done, total);
            }
            Err(refusal) => {
                failed = Some(refusal);
                break;
            }
        }
        if !work.is_wanted() {
            failed = Some(Refusal::new(ErrorCode::Unavailable, "the controller is shutting down"));
            break;
        }
    }
    drop(send);
    let stored = storing.await.map_err(|error| Refusal::new(ErrorCode::Internal, format!("store chunks: {error}")))?;
    match failed {
        Some(refusal) => Err(refusal),
        None => stored,
    }
}

/// Takes an answer apart and stores its chunks; how many bytes were new.
fn store(session: &mut Session, batch: &[Digest], answer: &[u8], host: &str) -> Result<u64, Refusal> {
    let wrong = |what: &str| Refusal::new(ErrorCode::Corrupt, format!("host {host} sent chunks that are {what}"));
    let mut rest = answer;
    let mut new_bytes = 0;
    for digest in batch {
        let (head, tail) = rest.split_first_chunk::<4>().ok_or_else(|| wrong("cut short"))?;
        let (bytes, tail) =
            tail.split_at_checked(u32::from_le_bytes(*head) as usize).ok_or_else(|| wrong("cut short"))?;
        new_bytes += session.put_chunk(digest, bytes)?.0;
        rest = tail;
    }
    if rest.is_empty() { Ok(new_bytes) } else { Err(wrong("longer than asked for")) }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Refusal::new(ErrorCode::Internal, format!("work on the repository: {error}")))?
}

/// The body of an answer, or the agent's refusal.
async fn body(answer: reqwest::Result<reqwest::Response>, limit: usize, origin: &Origin) -> Result<Bytes, Refusal> {
    let broken = |error: &reqwest::Error| unreachable_agent(&origin.endpoint, error);
    let mut answer = answer.map_err(|error| broken(&error))?;
    let status = answer.status();
    let mut bytes = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(|error| broken(&error))? {
        if bytes.len() + piece.len() > limit {
            let detail = format!("host {} sent more than {limit} bytes", origin.host_name);
            return Err(Refusal::new(ErrorCode::Corrupt, detail));
        }
        bytes.extend_from_slice(&piece);
    }
    let bytes = Bytes::from(bytes);
    if status.is_success() { Ok(bytes) } else { Err(agents_refusal(status, &bytes)) }
}

#[cfg(test)]
mod tests {
    use muster_repository::{digest_of, storage::MemoryStorage};

    use super::*;

    fn frame(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
    }

    #[test]
    fn only_the_chunks_that_were_asked_for_are_taken() {
        let repository = Repository::open(Arc::new(MemoryStorage::new())).unwrap();
        let mut session = repository.session();
        let (a, b) = (b"one chunk".to_vec(), b"another".to_vec());
        let names = [digest_of(&a), digest_of(&b)];
        let good = [frame(&a), frame(&b)].concat();
        let mut said = |answer: &[u8]| store(&mut session, &names, answer, "host1").map_err(|r| r.detail);
        assert_eq!(said(&good).unwrap(), (a.len() + b.len()) as u64);
        assert_eq!(said(&good).unwrap(), 0, "they are there");
        for len in 0..good.len() {
            assert!(said(&good[..len]).unwrap_err().contains("cut short"), "{len}");
        }
        assert!(said(&[&good[..], b"x"].concat()).unwrap_err().contains("longer"));
        assert!(said(&[frame(&b), frame(&a)].concat()).unwrap_err().contains("damaged"), "in another order");
    }
}
