package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// table is a socket to ctnetlink, for one request after the other.
type table struct {
	sockets map[int]*nl.SocketHandle
	answers []syscall.NetlinkMessage // received, not yet looked at
}

func open() (*table, error) {
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("conntrack: open netlink socket: %w", err)
	}
	if err := errors.Join(s.SetSendTimeout(&nl.SocketTimeoutTv), s.SetReceiveTimeout(&nl.SocketTimeoutTv)); err != nil {
		s.Close()
		return nil, fmt.Errorf("conntrack: netlink socket: %w", err)
	}
	return &table{sockets: map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}}, nil
}

func (t *table) close() {
	for _, s := range t.sockets {
		s.Close()
	}
}

func (t *table) request(operation, flags int, family uint8) *nl.NetlinkRequest {
	const ctnetlink = 1 // NFNL_SUBSYS_CTNETLINK
	req := nl.NewNetlinkRequest(ctnetlink<<8|operation, flags)
	req.Sockets = t.sockets
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return req
}

var errInterrupted = errors.New("the table changed too often while it was read")

// dump calls visit with each connection of both families, until it has enough.
func (t *table) dump(visit func(msg []byte) bool) error {
	req := t.request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, unix.AF_UNSPEC)
	err := req.ExecuteIter(unix.NETLINK_NETFILTER, 0, visit)
	if errors.Is(err, nl.ErrDumpInterrupted) {
		err = errInterrupted
	}
	if err != nil {
		return fmt.Errorf("conntrack: list: %w", err)
	}
	return nil
}

func (t *table) creation(f Flow) *nl.NetlinkRequest {
	// With NLM_F_EXCL a connection that is there is not changed: its translation can't be.
	req := t.request(nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL, f.family())
	f.encode(req)
	return req
}

func (t *table) create(f Flow) error {
	if err := errors.Join(f.complete(), f.creatable()); err != nil {
		return err
	}
	_, err := t.creation(f).Execute(unix.NETLINK_NETFILTER, 0)
	return err
}

func (t *table) removal(f Flow) *nl.NetlinkRequest {
	req := t.request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, f.family())
	f.encodeKey(req)
	return req
}

func (t *table) remove(f Flow) (bool, error) {
	if err := f.complete(); err != nil {
		return false, err
	}
	_, err := t.removal(f).Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// replaceAttempts is how often a packet may come between the removal of a connection and
// the creation of its successor.
const replaceAttempts = 10

// replace does both in one system call: some microseconds lie between them.
func (t *table) replace(f Flow) (err error) {
	if err := errors.Join(f.complete(), f.creatable()); err != nil {
		return err
	}
	f.ID = 0 // whoever has the addresses
	for range replaceAttempts {
		removal, creation := t.removal(f), t.creation(f)
		if err = t.send(append(removal.Serialize(), creation.Serialize()...)); err != nil {
			return err
		}
		gone, err := t.acknowledged(removal.Seq)
		if err != nil {
			return err
		}
		made, err := t.acknowledged(creation.Seq)
		switch {
		case err != nil:
			return err
		case gone != nil && !errors.Is(gone, unix.ENOENT):
			return gone
		case !errors.Is(made, unix.EEXIST):
			return made
		}
	}
	return unix.EEXIST
}

func (t *table) send(b []byte) error {
	s := t.sockets[unix.NETLINK_NETFILTER].Socket
	return unix.Sendto(s.GetFd(), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// acknowledged waits for the kernel's word on a request. err: there was none.
func (t *table) acknowledged(seq uint32) (result, err error) {
	for {
		if len(t.answers) == 0 {
			if t.answers, _, err = t.sockets[unix.NETLINK_NETFILTER].Socket.Receive(); err != nil {
				return nil, err
			}
		}
		m := t.answers[0]
		t.answers = t.answers[1:]
		if m.Header.Seq != seq || m.Header.Type != unix.NLMSG_ERROR || len(m.Data) < 4 {
			continue
		}
		if errno := int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 {
			return unix.Errno(-errno), nil
		}
		return nil, nil
	}
}
