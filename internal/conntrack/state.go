package conntrack

import (
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Bits of a connection's status: enum ip_conntrack_status.
const (
	statusExpected  = 1 << 0
	statusSeenReply = 1 << 1
	statusAssured   = 1 << 2
	statusConfirmed = 1 << 3
	statusSNAT      = 1 << 4
	statusDNAT      = 1 << 5
	statusSeqAdjust = 1 << 6
)

// stateName says what a flow table of ours would call the state. Half-closed TCP goes on.
func stateName(proto, tcp uint8, status uint32) string {
	switch {
	case isICMP(proto):
		return Query
	case proto != unix.IPPROTO_TCP && status&statusSeenReply != 0:
		return TwoWay
	case proto != unix.IPPROTO_TCP:
		return OneWay
	}
	switch tcp {
	case nl.TCP_CONNTRACK_ESTABLISHED, nl.TCP_CONNTRACK_FIN_WAIT, nl.TCP_CONNTRACK_CLOSE_WAIT:
		return Established
	case nl.TCP_CONNTRACK_LAST_ACK, nl.TCP_CONNTRACK_TIME_WAIT, nl.TCP_CONNTRACK_CLOSE:
		return Closing
	}
	return Syn
}

// answered tells whether the remote has spoken.
func (f Flow) answered() bool {
	switch f.State {
	case Established, Closing, TwoWay:
		return true
	}
	return f.Packets[1] > 0
}

func (f Flow) tcpState() uint8 {
	switch {
	case f.State == Established:
		return nl.TCP_CONNTRACK_ESTABLISHED
	case f.State == Closing:
		return nl.TCP_CONNTRACK_TIME_WAIT // takes what is still under way; a SYN begins anew
	case f.answered():
		return nl.TCP_CONNTRACK_SYN_RECV
	}
	return nl.TCP_CONNTRACK_SYN_SENT
}

// status is that of a new connection. One that was answered is assured: the kernel does
// not give it up early when its table is full.
func (f Flow) status() uint32 {
	s := uint32(statusConfirmed)
	if f.answered() {
		s |= statusSeenReply
	}
	if f.Assured || f.State == Established || f.State == TwoWay {
		s |= statusSeenReply | statusAssured
	}
	return s
}

// usualTimeout is only in force until the next packet: then the kernel's own is.
func usualTimeout(proto uint8, state string) time.Duration {
	switch state {
	case Established:
		return 7440 * time.Second
	case Syn, Closing:
		return 240 * time.Second
	case TwoWay:
		return 300 * time.Second
	case Query:
		return 60 * time.Second
	}
	if proto == unix.IPPROTO_UDP || proto == protoUDPLite {
		return 120 * time.Second
	}
	return 600 * time.Second
}
