package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Server is a server running in a namespace.
type Server struct {
	// Addr is where it listens, with the port filled in.
	Addr netip.AddrPort

	stop func() error
	done sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

// Close ends the server and its connections, and waits for its goroutines.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	err := s.stop()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.done.Wait()
	return err
}

// serve runs f for a connection, which Close then closes.
func (s *Server) serve(c net.Conn, f func(net.Conn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.Close()
		return
	}
	s.conns[c] = true
	s.done.Go(func() {
		f(c)
		c.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
	})
}

// greeting is what an echo server says first: the source address it sees.
const greeting = "you are "

func greet(peer net.Addr) string {
	ap := netip.MustParseAddrPort(peer.String())
	return fmt.Sprintf("%s%s\n", greeting, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
}

func parseGreeting(line string) (netip.AddrPort, error) {
	s, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), greeting)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("answer %q: not from an echo server", line)
	}
	return netip.ParseAddrPort(s)
}

// EchoTCP starts a server that says "you are ADDRESS:PORT\n" to each client and
// then echoes what it receives.
func EchoTCP(ns *NS, local netip.AddrPort) (*Server, error) {
	l, err := ListenTCP(ns, local)
	if err != nil {
		return nil, err
	}
	s := &Server{Addr: l.Addr().(*net.TCPAddr).AddrPort(), stop: l.Close, conns: map[net.Conn]bool{}}
	s.done.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed, or out of descriptors: clients then time out
			}
			s.serve(c, func(c net.Conn) {
				if _, err := io.WriteString(c, greet(c.RemoteAddr())); err == nil {
					io.Copy(c, c)
				}
			})
		}
	})
	return s, nil
}

// EchoUDP starts a server that answers each datagram with "you are
// ADDRESS:PORT\n" and the datagram.
func EchoUDP(ns *NS, local netip.AddrPort) (*Server, error) {
	if local.Addr().IsUnspecified() {
		return nil, fmt.Errorf("udp echo on %s: needs one address (answers could leave from another)", local)
	}
	c, err := ListenUDP(ns, local)
	if err != nil {
		return nil, err
	}
	s := &Server{Addr: c.LocalAddr().(*net.UDPAddr).AddrPort(), stop: c.Close}
	s.done.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, peer, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			// An answer that can't be sent is a time-out of the client.
			c.WriteTo(append([]byte(greet(peer)), buf[:n]...), peer)
		}
	})
	return s, nil
}

// AskTCP connects to an EchoTCP server and returns the source address it saw
// and the connection, on which everything sent comes back.
func AskTCP(ctx context.Context, ns *NS, local, server netip.AddrPort) (netip.AddrPort, *net.TCPConn, error) {
	c, err := DialTCP(ctx, ns, local, server)
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(past) })()
	// One byte at a time: a larger buffer would swallow the first echoes.
	line, err := bufio.NewReaderSize(oneByte{c}, 16).ReadString('\n')
	seen := netip.AddrPort{}
	if err == nil {
		seen, err = parseGreeting(line)
	}
	if err != nil {
		c.Close()
		return netip.AddrPort{}, nil, fmt.Errorf("tcp echo of %s: %w", server, err)
	}
	return seen, c, nil
}

type oneByte struct{ io.Reader }

func (r oneByte) Read(p []byte) (int, error) { return r.Reader.Read(p[:min(len(p), 1)]) }

// AskUDP sends a datagram to an EchoUDP server and returns the source address
// it saw. It is sent again each second, since UDP may lose the first ones.
func AskUDP(ctx context.Context, ns *NS, local, server netip.AddrPort, payload []byte) (netip.AddrPort, error) {
	c, err := DialUDP(ctx, ns, local, server)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer c.Close()
	return AskUDPOn(ctx, c, payload)
}

// AskUDPOn is AskUDP on an existing connected socket.
func AskUDPOn(ctx context.Context, c *net.UDPConn, payload []byte) (netip.AddrPort, error) {
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(past) })()
	buf := make([]byte, 1<<16)
	for ctx.Err() == nil {
		if _, err := c.Write(payload); err != nil {
			return netip.AddrPort{}, fmt.Errorf("udp echo of %s: %w", c.RemoteAddr(), err)
		}
		// A cancellation just before this line is noticed a second later.
		c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(buf)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			continue
		}
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("udp echo of %s: %w", c.RemoteAddr(), err)
		}
		line, rest, _ := bytes.Cut(buf[:n], []byte("\n"))
		if !bytes.Equal(rest, payload) {
			return netip.AddrPort{}, fmt.Errorf("udp echo of %s: %d bytes came back altered", c.RemoteAddr(), len(rest))
		}
		return parseGreeting(string(line))
	}
	return netip.AddrPort{}, fmt.Errorf("udp echo of %s: %w", c.RemoteAddr(), ctx.Err())
}

// past is a deadline that interrupts a blocked read.
var past = time.Unix(1, 0)
