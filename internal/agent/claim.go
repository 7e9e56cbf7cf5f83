package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// rulesOwner is an abstract socket: a network namespace has one of that name, as it has
// one set of rules, and the kernel takes it away with the process.
const rulesOwner = "@bauta/iptables"

// ErrBusy says that another agent owns the rules of this network namespace.
var ErrBusy = errors.New("another agent in iptables mode runs in this network namespace")

// claimRules makes this process the owner of the rules in this network namespace.
func claimRules() (io.Closer, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: rulesOwner, Net: "unix"})
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, &Error{ErrBusy, []string{"stop it first: rules have one owner"}}
	case err != nil:
		return nil, fmt.Errorf("iptables: own the rules: %w", err)
	}
	return l, nil
}
