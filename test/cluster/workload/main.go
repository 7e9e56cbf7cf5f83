// Command workload is what runs in the pods of the cluster test: it answers as a
// server (package talk), and a control port has it act as a client.
//
//	workload pause                     holds the namespaces of a pod
//	workload serve -port P -control C  TCP, UDP and HTTP (on P+1), and the control port
package main

import (
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"bauta.dev/bauta/test/cluster/talk"
)

func main() {
	log.SetFlags(log.Lmicroseconds)
	switch {
	case len(os.Args) > 1 && os.Args[1] == "pause":
		pause()
	case len(os.Args) > 1 && os.Args[1] == "serve":
		log.Fatal(serve(os.Args[2:]))
	default:
		fmt.Fprintln(os.Stderr, "usage: workload pause|serve")
		os.Exit(2)
	}
}

// pause waits for its end. As the first process of a pod it reaps orphans.
func pause() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for pid := 1; pid > 0; {
			pid, _ = syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		}
	}
}

func serve(args []string) error {
	f := flag.NewFlagSet("serve", flag.ExitOnError)
	port := f.Int("port", 7000, "of the TCP and the UDP server; the HTTP server has the next one")
	control := f.Int("control", 9000, "port for orders")
	f.Parse(args)
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	if n := os.Getenv("POD_NAME"); n != "" {
		name = n // a pod with the host's network has the host's name
	}
	tcp, err := net.Listen("tcp", fmt.Sprintf(":%d", *port))
	if err != nil {
		return err
	}
	go talk.ServeTCP(tcp, name)
	// A datagram must be answered from the address that it was sent to.
	for _, ip := range strings.Split(os.Getenv("POD_IPS"), ",") {
		udp, err := net.ListenPacket("udp", net.JoinHostPort(ip, strconv.Itoa(*port)))
		if err != nil {
			return err
		}
		go talk.ServeUDP(udp, name)
	}
	go func() { log.Fatal(http.ListenAndServe(fmt.Sprintf(":%d", *port+1), talk.Handler(name))) }()

	// A pod need not wait for the grace period: nothing here is worth it.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() { <-signals; os.Exit(0) }()
	return http.ListenAndServe(fmt.Sprintf(":%d", *control), newOrders())
}
