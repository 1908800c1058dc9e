#!/usr/bin/env bash
# A real Slurm cluster of N nodes on one Linux machine that lives as long as one command.
#
#   testbed.sh N CMD...    start N nodes, run CMD on the login node, take everything down, exit with CMD's status
#   testbed.sh 2 bash      for looking around: sinfo, sbatch, /etc/slurm/log
#
# Needs root, and Debian (or a relative) to install what is missing; ends with status 77 where it cannot run.
#
# The cluster is one PID namespace, so nothing that it started can outlive it, however it ends. Its network and its
# files (a tmpfs over /etc/slurm) are private too, so any number of clusters run side by side and a crashed one leaves
# nothing behind. Inside, each node is a set of namespaces of its own, with its own slurmd, host name, address,
# loopback and processes; other files are shared, as on a real cluster. No systemd, cgroups or database is used.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

NET=10.213.78    # first three octets of the cluster's network
GPUS=2           # pretend GPUs per node: character devices, so that --gres sets CUDA_VISIBLE_DEVICES
DIR=/etc/slurm   # as seen inside

cannot() { echo "testbed: cannot run a Slurm here: $*" >&2; exit 77; }

install_packages() {
    local log cmd missing=
    for cmd in slurmctld slurmd sbatch munged ip nsenter mount; do command -v $cmd >/dev/null || missing=1; done
    [ "$missing" ] || return 0
    command -v apt-get >/dev/null || cannot "no apt-get to install slurmctld, slurmd, slurm-client, munge"
    log=$(mktemp)
    install() {
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 --no-install-recommends install \
            slurmctld slurmd slurm-client munge iproute2 util-linux mount >>"$log" 2>&1
    }
    echo "testbed: installing Slurm" >&2
    install || { apt-get -qq update >>"$log" 2>&1 && install; } || { tail -n 5 "$log" >&2; cannot "apt-get failed"; }
    rm -f "$log"
}

write_config() {    # N
    local i
    mkdir -p $DIR/{log,run,state,spool,dev}
    (umask 077; head -c 128 /dev/urandom >$DIR/munge.key)
    { echo "127.0.0.1 localhost"; echo "$NET.254 login"
      for ((i = 1; i <= $1; i++)); do echo "$NET.$i node$i"; done; } >$DIR/hosts
    echo "hosts: files" >$DIR/nsswitch.conf    # look-ups of unknown names fail at once, not after DNS timeouts
    # Slurm wants character devices, and reads the number in their name into CUDA_VISIBLE_DEVICES.
    for ((i = 0; i < GPUS; i++)); do ln -s /dev/null $DIR/dev/nvidia$i; done
    echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >$DIR/gres.conf
    cat >$DIR/slurm.conf <<CONF
ClusterName=testbed
SlurmctldHost=login($NET.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits cred_expire + 1 s before it may start again; 5 is the least, the default is 120
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
# no systemd, no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# nodes may offer more CPUs than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# short timers
KillWait=5
MinJobAge=3600
SchedulerParameters=bf_interval=1,sched_interval=5
NodeName=node[1-$1] NodeAddr=$NET.[1-$1] CPUs=4 RealMemory=4000 Gres=gpu:$GPUS
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE
CONF
}

start_node() {    # I
    # Outside in: a network with one cable to the cluster's bridge, then processes, mounts and host name. The node's
    # init is a bash, which reaps the orphans that slurmd leaves.
    # shellcheck disable=SC2016
    unshare --net bash -ec '
        ip link add eth0 type veth peer name "cable$1" netns 1
        nsenter --net=/proc/1/ns/net ip link set "cable$1" master bridge0 up
        ip addr add "$2.$1/24" dev eth0; ip link set lo up; ip link set eth0 up
        exec unshare --pid --fork --kill-child --mount --mount-proc --uts \
            bash -c "hostname node$1; slurmd -D -f $3/slurm.conf -N node$1 & wait"
    ' node "$1" "$NET" "$DIR" >"$DIR/log/node$1.out" 2>&1 </dev/null &
    echo $! >"$DIR/run/node$1.pid"    # its death is the node's
}

wait_for() {    # CMD...: poll until it succeeds
    local deadline=$((SECONDS + 60))
    until "$@"; do
        if [ $SECONDS -ge $deadline ]; then
            echo "testbed: not up in 60 s" >&2; tail -n 5 $DIR/log/* >&2; exit 1
        fi
        sleep 0.2
    done
}
idle() { [ "$(timeout 5 sinfo -h -N -r -t idle -o %N 2>/dev/null | wc -l)" = "$1" ]; }

cluster() {    # N CMD...: as init of the cluster's namespaces
    local n=$1 i; shift
    mount -t tmpfs tmpfs $DIR
    write_config "$n"
    hostname login
    mount --bind $DIR/hosts /etc/hosts
    mount --bind $DIR/nsswitch.conf /etc/nsswitch.conf
    ip link set lo up
    ip link add bridge0 type bridge
    ip addr add $NET.254/24 dev bridge0; ip link set bridge0 up
    munged --socket=$DIR/run/munge.sock --key-file=$DIR/munge.key --pid-file=$DIR/run/munged.pid \
        --log-file=$DIR/log/munged.log --seed-file=$DIR/run/munge.seed </dev/null >$DIR/log/munged.out 2>&1
    slurmctld -f $DIR/slurm.conf </dev/null >$DIR/log/slurmctld.out 2>&1
    for ((i = 1; i <= n; i++)); do start_node "$i"; done
    wait_for idle "$n"
    "$@"    # not exec: when this shell, the init, ends, the kernel kills whatever is left
}

case ${1:-} in
    --inside) shift; cluster "$@" ;;
    [1-9]*)
        [ $# -ge 2 ] || { echo "testbed: what command?" >&2; exit 2; }
        [ "$(id -u)" = 0 ] || cannot "it needs root"
        [ "$(uname)" = Linux ] || cannot "it needs Linux"
        install_packages
        mkdir -p $DIR
        space=(unshare --net --pid --fork --kill-child --mount --mount-proc --uts)
        "${space[@]}" true 2>/dev/null || cannot "no permission for namespaces"
        # A caller from inside a job or another cluster must not confuse this one.
        for name in "${!SLURM@}" "${!SBATCH@}"; do unset "$name"; done
        exec "${space[@]}" "$BASH" "$0" --inside "$@" ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
