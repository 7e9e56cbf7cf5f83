package agent

import (
	"errors"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// checkPrivilege refuses to start without what no kernel gives later. What eBPF mode needs
// beyond that is missed when its programs are loaded.
func checkPrivilege(bpf bool) error {
	var caps [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
		return nil
	}
	missing := ""
	switch has := caps[0].Effective; {
	case has&(1<<unix.CAP_NET_ADMIN) == 0:
		missing = "NET_ADMIN"
	case !bpf && has&(1<<unix.CAP_NET_RAW) == 0: // iptables opens a raw socket
		missing = "NET_RAW"
	default:
		return nil
	}
	return advice.New(errors.New("agent: the capability "+missing+" is missing"),
		"in a container: BPF, NET_ADMIN and PERFMON; in iptables mode NET_ADMIN and NET_RAW")
}
