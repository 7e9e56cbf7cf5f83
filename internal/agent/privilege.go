package agent

import (
	"errors"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// checkPrivilege refuses to start without what both modes need and no kernel gives later.
func checkPrivilege() error {
	var caps [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0])
	if err != nil || caps[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0 {
		return nil
	}
	return advice.New(errors.New("agent: the capability NET_ADMIN is missing"),
		"a container needs BPF, NET_ADMIN and PERFMON; in iptables mode NET_ADMIN and NET_RAW")
}
